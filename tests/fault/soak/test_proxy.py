"""The proxy really does to TCP connections what it says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.fault.soak.proxy import FaultyProxy

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def echoing() -> AsyncIterator[tuple[FaultyProxy, Streams, list[bytes]]]:
    """A proxy before a server that echoes, a connection through it, and how the server's side of
    each connection ended."""
    ends = list[bytes]()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(100):
                writer.write(data)
            ends.append(b"closed")
        except ConnectionResetError:
            ends.append(b"reset")
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with FaultyProxy(f"127.0.0.1:{port}") as proxy:
        streams = await connected(proxy)
        assert await said(streams, b"before") == b"before"
        yield proxy, streams, ends
        streams[1].close()
    server.close()


async def connected(proxy: FaultyProxy) -> Streams:
    host, _, port = proxy.address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def said(streams: Streams, data: bytes) -> bytes:
    streams[1].write(data)
    return await asyncio.wait_for(streams[0].read(100), 5)


async def test_reset_is_seen_on_both_sides_and_new_connections_pass() -> None:
    async with echoing() as (proxy, (reader, _), ends):
        await proxy.reset()
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(1), 5)
        assert proxy.connections == 0
        again = await connected(proxy)
        assert await said(again, b"after") == b"after"
        again[1].close()
    assert ends[0] == b"reset"


async def test_half_open_says_nothing_and_loses_nothing() -> None:
    async with echoing() as (proxy, (reader, writer), ends):
        proxy.halt()
        writer.write(b"into the cable")
        fresh = await connected(proxy)  # accepted, and silent too
        fresh[1].write(b"new")
        for stream in (reader, fresh[0]):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(stream.read(1), 0.2)
        assert not ends
        proxy.resume()
        assert await asyncio.wait_for(reader.read(100), 5) == b"into the cable"
        assert await asyncio.wait_for(fresh[0].read(100), 5) == b"new"
        fresh[1].close()


async def test_latency_counts_both_ways() -> None:
    async with echoing() as (proxy, streams, _):
        proxy.latency_s = 0.15
        begin = time.monotonic()
        assert await said(streams, b"slow") == b"slow"
        assert time.monotonic() - begin >= 0.3


async def test_the_target_may_be_away_and_move() -> None:
    async with echoing() as (proxy, _, _):
        there, proxy.target = proxy.target, "127.0.0.1:1"
        nobody = await connected(proxy)
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(nobody[0].read(1), 5)
        proxy.target = there
        again = await connected(proxy)
        assert await said(again, b"back") == b"back"
        again[1].close()
