"""The web port: a thread for each request, for as long as it may take to arrive and no longer."""

from __future__ import annotations

import io
import threading
import time
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

_MOST_REQUESTS = 256
_ARRIVAL_S, _SENDING_S = 5.0, 10.0
"""How long a request may take to arrive, and its answer to be taken."""
_MOST_BYTES = 16 * 1024
"""Of a request: pages are asked for with GET."""


class _Server(ThreadingMixIn, WSGIServer):
    """At most 256 requests at once; beyond, connections are closed."""

    request_queue_size = 128
    daemon_threads = True
    block_on_close = False

    def __init__(self, *arguments: Any, **more: Any) -> None:
        self._room = threading.BoundedSemaphore(_MOST_REQUESTS)
        super().__init__(*arguments, **more)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is no news."""


class _Handler(WSGIRequestHandler):
    def handle(self) -> None:
        if request := self._arrived():
            self.rfile = io.BytesIO(request)
            self.connection.settimeout(_SENDING_S)
            super().handle()

    def _arrived(self) -> bytes | None:
        """The request, up to the empty line; None if it does not come in time, or is too long."""
        end, request = time.monotonic() + _ARRIVAL_S, b""
        while b"\r\n\r\n" not in request:
            left_s = end - time.monotonic()
            if left_s <= 0 or len(request) > _MOST_BYTES:
                return None
            self.connection.settimeout(left_s)
            try:
                data = self.connection.recv(4096)
            except OSError:
                return None
            if not data:
                return None
            request += data
        return request

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are no news."""


def serve_web(application: Any, address: str) -> tuple[WSGIServer, int]:
    """A started web server of the WSGI application on `address`, and the port it took. Raises
    RuntimeError if that is in use."""
    host, _, port = address.rpartition(":")
    try:
        server = make_server(host, int(port), application, _Server, _Handler)
    except OSError as error:
        raise RuntimeError(str(error)) from error
    threading.Thread(target=server.serve_forever, name="web", daemon=True).start()
    return server, server.server_port
