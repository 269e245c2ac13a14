"""How calls are made: channel options, failures in one readable line, when to try again."""

from __future__ import annotations

import json
import time
from typing import Any

import grpc

from ibtree.errors import Fault, IbtpoError
from ibtree.wire.calls import SERVICES

DEFAULT_TARGET = "127.0.0.1:7300"
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_REMEDY = "start ibtpo-server or give its address"
_RETRY = {
    "maxAttempts": 5,
    "initialBackoff": "0.2s",
    "maxBackoff": "3s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    (
        "grpc.service_config",
        json.dumps(
            {
                "methodConfig": [
                    # gRPC's own retries of a stream whose sender still waits for an answer hang,
                    # beyond the deadline: client/push.py tries again itself
                    {"name": [{"service": "ibtree.v1.WeightsService", "method": "PushWeights"}]},
                    {
                        "name": [{"service": f"ibtree.v1.{s}"} for s in SERVICES],
                        "retryPolicy": _RETRY,
                    },
                ]
            }
        ),
    ),
]


class RpcFailed(IbtpoError, RuntimeError):
    """A call failed: `code` is the gRPC status; the message says what and where in one line.
    `retry_after_s`: when the server wants to be asked again; None: it did not say."""

    fault = Fault.DEPENDENCY

    def __init__(
        self,
        method: str,
        target: str,
        code: grpc.StatusCode,
        details: str,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(f"{method} at {target}: {code.name}: {details}")
        self.code, self.details, self.retry_after_s = code, details, retry_after_s
        self.status = code.name


def failure(method: str, target: str, error: Any) -> RpcFailed:
    """The RpcFailed of a grpc.RpcError that ended a call."""
    code, details = error.code(), error.details() or "no details"
    if code is grpc.StatusCode.UNAVAILABLE and "connect" in details.lower():
        details = f"no server answers there; {_REMEDY}"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and details == "Deadline Exceeded":
        details = f"no answer in time; {_REMEDY}"
    hints = dict(error.trailing_metadata() or ())
    hint_ms = float(hints.get("grpc-retry-pushback-ms", -1))
    failed = RpcFailed(method, target, code, details, hint_ms / 1000 if hint_ms >= 0 else None)
    failed.__cause__ = error
    return failed


class Deadline:
    """The time limit of one call, over all its attempts."""

    def __init__(self, timeout_s: float) -> None:
        self._until = time.monotonic() + timeout_s

    @property
    def left_s(self) -> float:
        return max(self._until - time.monotonic(), 0.001)

    def pause_s(self, failed: RpcFailed) -> float:
        """Seconds until the next attempt, if the server was too busy and asked for one in time;
        raises the failure otherwise."""
        busy = failed.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        pause_s = failed.retry_after_s
        if not busy or pause_s is None or pause_s >= self.left_s:
            raise failed
        return pause_s
