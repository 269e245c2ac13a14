"""When a call is tried again: while its server restarts, until its deadline, not for ever."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from ibtree import AsyncClient, Client
from ibtree.client import RpcFailed, channel
from ibtree.client.channel import Attempts
from ibtree.wire.calls import GET_QUEUE_STATS
from ibtree.wire.v1 import queue_pb2
from tests.server_ext.fakes import until

UNAVAILABLE, BUSY = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED


class Restarting:
    """A server on one port that answers GetQueueStats, or is away."""

    def __init__(self) -> None:
        self.port, self.asked, self._server = 0, 0, None

    async def up(self) -> None:
        async def stats(request, context):
            self.asked += 1
            return queue_pb2.GetQueueStatsResponse(queued=7)

        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        handler = grpc.unary_unary_rpc_method_handler(
            stats,
            GET_QUEUE_STATS.request.FromString,
            GET_QUEUE_STATS.response.SerializeToString,
        )
        service = GET_QUEUE_STATS.path.split("/")[1]
        self._server.add_registered_method_handlers(service, {"GetQueueStats": handler})
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def down(self) -> None:
        await self._server.stop(0)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"


@pytest.fixture
async def server():
    server = Restarting()
    await server.up()
    yield server
    await server.down()


@pytest.mark.parametrize("away_s", [0.3, 3.5])
async def test_a_restart_is_waited_out(server, away_s):
    """By both clients; they gave up after 2.7 s of 60."""

    def blocking() -> int:
        with Client(server.target, timeout_s=60.0) as client:
            client.queue_stats()
            connected.set()
            gone.wait()
            return client.queue_stats().queued

    import threading

    connected, gone = threading.Event(), threading.Event()
    other = asyncio.create_task(asyncio.to_thread(blocking))
    async with AsyncClient(server.target, timeout_s=60.0) as client:
        await client.queue_stats()
        await until(connected.is_set)
        await server.down()
        gone.set()
        calls = [asyncio.create_task(client.queue_stats()), other]
        await asyncio.sleep(away_s)
        assert not any(call.done() for call in calls)
        back = time.monotonic()
        await server.up()
        stats, queued = await asyncio.gather(*calls)
        assert stats.queued == queued == 7
        assert time.monotonic() - back < 6.0


async def test_a_server_that_stays_away_ends_with_the_time(server):
    async with AsyncClient(server.target, timeout_s=0.6) as client:
        await client.queue_stats()
        await server.down()
        began = time.monotonic()
        with pytest.raises(RpcFailed, match="UNAVAILABLE: no server answers there"):
            await client.queue_stats()
        assert time.monotonic() - began < 2.0
    await server.up()


async def test_nobody_there_is_told_soon():
    """A forgotten server, or a wrong address: not after the ten minutes that a tree may take."""
    began = time.monotonic()
    async with AsyncClient("127.0.0.1:1", timeout_s=600.0) as client:
        with pytest.raises(RpcFailed, match="no server answers there"):
            await client.queue_stats()
    assert time.monotonic() - began < 6.0


def failed(code: grpc.StatusCode, hint_s: float | None = None, answered: bool = False) -> RpcFailed:
    return RpcFailed("Method", "target", code, "details", hint_s, answered)


class Clock:
    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(channel, "time", clock)
    return clock


def tries(attempts: Attempts, clock: Clock, *failure) -> float:
    """Seconds until the call is given up."""
    began = clock.now_s
    with pytest.raises(RpcFailed):
        for _ in range(10_000):
            clock.now_s += attempts.pause_s(failed(*failure))
    return clock.now_s - began


def test_how_long_a_call_is_tried(clock):
    assert 50.0 < tries(Attempts(60.0, known=True), clock, UNAVAILABLE) < 60.0
    assert 1.0 < tries(Attempts(60.0), clock, UNAVAILABLE) < 4.0
    assert 4.0 < tries(Attempts(60.0, 5.0, known=True), clock, UNAVAILABLE) < 10.0
    assert 1.0 < tries(Attempts(60.0, known=True), clock, UNAVAILABLE, None, True) < 4.0
    assert 45.0 < tries(Attempts(60.0), clock, BUSY, 10.0) < 60.0
    assert tries(Attempts(60.0, known=True), clock, BUSY) == 0.0
    assert tries(Attempts(60.0, known=True), clock, grpc.StatusCode.INTERNAL) == 0.0
    assert tries(Attempts(60.0, known=True), clock, BUSY, 61.0) == 0.0


def test_a_message_makes_up_for_failures(clock):
    attempts = Attempts(600.0, 5.0)
    for _ in range(20):
        for _ in range(3):
            clock.now_s += attempts.pause_s(failed(UNAVAILABLE))
        attempts.answered()
    assert clock.now_s > 110.0
