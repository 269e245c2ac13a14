"""A TCP proxy whose connections can be reset, left half-open, or slowed down."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from typing import Self

_LINGER_0 = struct.pack("ii", 1, 0)
"""struct linger: closing sends RST instead of FIN."""
_READ_BYTES = 65536


class FaultyProxy:
    """Passes bytes both ways between `address`, which stays, and `target`, which may change."""

    def __init__(self, target: str = "") -> None:
        self.target = target
        self.latency_s = 0.0
        """How long each read waits before it is passed on, either way."""
        self._flows = asyncio.Event()
        self._flows.set()
        self._open: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self.reset()

    @property
    def connections(self) -> int:
        return len(self._open)

    async def reset(self) -> None:
        """Ends every connection with RST, on both sides."""
        tasks = list(self._open)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def halt(self) -> None:
        """From now on nothing passes, and nobody is told: connections are half-open, as when a
        cable is cut. New ones are accepted, and silent too."""
        self._flows.clear()

    def resume(self) -> None:
        """What was held back passes."""
        self._flows.set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._open.add(task)
        ends = [writer]
        try:
            await self._flows.wait()
            host, _, port = self.target.rpartition(":")
            there, back = await asyncio.open_connection(host, int(port))
            ends.append(back)
            await self._until_one_ends(self._pass(reader, back), self._pass(there, writer))
        except (OSError, asyncio.CancelledError):
            pass  # nobody listens there, or `reset`
        finally:
            self._open.discard(task)
            for end in ends:
                _abort(end)

    async def _until_one_ends(self, *ways: object) -> None:
        tasks = [asyncio.ensure_future(way) for way in ways]  # type: ignore[arg-type]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(_READ_BYTES):
                if self.latency_s:
                    await asyncio.sleep(self.latency_s)
                await self._flows.wait()
                writer.write(data)
                await writer.drain()


def _abort(writer: asyncio.StreamWriter) -> None:
    end = writer.get_extra_info("socket")
    with suppress(OSError):  # it is closed already
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
    writer.transport.abort()
