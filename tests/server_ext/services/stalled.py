"""Callers that begin something and do not go on, with bytes on real sockets."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from typing import Self

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _GOAWAY = 0, 1, 3, 4, 7


def _frame(kind: int, payload: bytes, stream: int = 1, flags: int = 0) -> bytes:
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags])
    return head + stream.to_bytes(4, "big") + payload


def _headers(path: str) -> bytes:
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    coded = [
        b"\0" + bytes([len(n)]) + n.encode() + bytes([len(v)]) + v.encode()
        for n, v in fields.items()
    ]  # HPACK: literals, without indexing
    return b"".join(coded)


def grpc_call(path: str, announced_bytes: int | None = None, sent_bytes: int = 0) -> bytes:
    """The beginning of a gRPC call: its headers and, if `announced_bytes` says how long the message
    is, the first `sent_bytes` of it."""
    begun = _PREFACE + _frame(_SETTINGS, b"", stream=0) + _frame(_HEADERS, _headers(path), flags=4)
    if announced_bytes is None:
        return begun
    return begun + _frame(_DATA, b"\0" + announced_bytes.to_bytes(4, "big") + b"x" * sent_bytes)


class Stalled:
    """`with Stalled(address, count, data)`: so many connections on which these bytes were sent."""

    def __init__(self, address: str, count: int, data: bytes) -> None:
        self._address, self._count, self._data = address, count, data
        self._stack = ExitStack()
        self.sockets: list[socket.socket] = []

    def __enter__(self) -> Self:
        host, _, port = self._address.rpartition(":")
        for _ in range(self._count):
            connection = socket.create_connection((host, int(port)), timeout=10)
            self._stack.enter_context(connection)
            connection.sendall(self._data)
            self.sockets.append(connection)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def wait_ended(self) -> None:
        """Returns when the server has ended each call, or closed the connection; raises
        TimeoutError if it says nothing for ten seconds."""
        for connection in self.sockets:
            while _read(connection) not in (_HEADERS, _RST_STREAM, _GOAWAY, None):
                pass


def _read(connection: socket.socket) -> int | None:
    """The kind of the next frame; None: the connection was closed."""
    try:
        head = connection.recv(9, socket.MSG_WAITALL)
        if len(head) < 9:
            return None
        connection.recv(int.from_bytes(head[:3], "big"), socket.MSG_WAITALL)
    except ConnectionError:
        return None
    return head[3]
