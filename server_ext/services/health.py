"""gRPC health, on the main port and, from the first second on, on a port of its own.

The health port has its own threads: it answers NOT_SERVING while the engine loads, and again when
nothing has moved for a while: the event loop does not turn, or the engine's work stands still. A
call holds a thread from its beginning on, also while its message does not come; so there are many
threads (made when they are needed), and connections do not last: a probe makes a new one.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from ibtree.wire import calls

SERVICES = ("", *(f"ibtree.v1.{name}" for name in calls.SERVICES))
_STALE_S = 60.0
_MOST_CALLS = 256
_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 4096),
    ("grpc.server_handshake_timeout_ms", 2_000),
    # what a connection holds is free again after these two
    ("grpc.max_connection_age_ms", 2_000),
    ("grpc.max_connection_age_grace_ms", 1_000),
]


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Status of the server; `serving(True)` once it has generated, `beat` whenever work moved.

    Check only: a watcher would hold a thread of those that probes need.
    """

    def __init__(self, stale_s: float | None = None) -> None:
        """`stale_s`: without a beat for so long the server counts as stuck [s]; None: a minute."""
        self._stale_s = stale_s
        self._inner = health.HealthServicer()
        self._beat = time.monotonic()
        self.serving(False)

    def add_to(self, server: Any) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    def serving(self, yes: bool) -> None:
        self.beat()
        status = health_pb2.HealthCheckResponse
        for service in SERVICES:
            self._inner.set(service, status.SERVING if yes else status.NOT_SERVING)
        self._ready = yes

    def beat(self) -> None:
        """Work has moved."""
        self._beat = time.monotonic()

    def Check(self, request: Any, context: Any) -> Any:
        stale_s = _STALE_S if self._stale_s is None else self._stale_s
        if self._ready and time.monotonic() - self._beat > stale_s:
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)
        return self._inner.Check(request, context)


def serve_health(servicer: Health, address: str) -> tuple[grpc.Server, int]:
    """A started server on `address` and the port it took. Raises RuntimeError if it is in use."""
    server = grpc.server(
        ThreadPoolExecutor(_MOST_CALLS, thread_name_prefix="health"),
        options=_OPTIONS,
        maximum_concurrent_rpcs=_MOST_CALLS,
    )
    servicer.add_to(server)
    port = server.add_insecure_port(address)
    server.start()
    return server, port
