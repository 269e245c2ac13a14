"""A TCP connection that breaks at a chosen byte."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import Self


class Proxy:
    """Passes bytes on to a server; the n-th connection breaks after `cuts[n]` bytes from the
    client, the others never."""

    def __init__(self, target: str, cuts: list[int]) -> None:
        self._host, _, port = target.rpartition(":")
        self._port, self._cuts = int(port), deque(cuts)
        self.sent = 0
        """Bytes that clients sent so far."""
        self.broken = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.target = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()

    def break_all(self) -> None:
        """Every connection breaks now."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._host, self._port)
        left = self._cuts.popleft() if self._cuts else None
        self._writers |= {writer, back}

        async def answers() -> None:
            with suppress(ConnectionError):
                while data := await there.read(65536):
                    writer.write(data)
                    await writer.drain()

        task = asyncio.create_task(answers())
        self._tasks.add(task)
        with suppress(ConnectionError):
            while data := await reader.read(65536 if left is None else min(left, 65536)):
                self.sent += len(data)
                back.write(data)
                await back.drain()
                if left is not None:
                    left -= len(data)
                    if not left:
                        self.broken += 1
                        break
        back.close()
        writer.close()
