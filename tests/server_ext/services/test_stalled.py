"""Callers that stall, and callers that are too many or too large: the others do not notice."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ibtree import Prompt
from ibtree.wire import calls
from ibtree.wire.calls import LARGE_BYTES, MESSAGE_BYTES, METHODS, Method
from server_ext.services import health as health_module
from server_ext.services import web
from server_ext.services.channel import grpc_server
from server_ext.services.health import Health, serve_health
from server_ext.services.metrics import Metrics, serve_metrics
from tests.server_ext.fakes import until
from tests.server_ext.services.stalled import Stalled, grpc_call
from tests.server_ext.site import DEFAULTS, Site, prompt

CHECK = "/grpc.health.v1.Health/Check"
DEADLINE, FULL = grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED
UNARY = [method for method in METHODS if method.name != "PushWeights"]
SERVING = health_pb2.HealthCheckResponse.SERVING
STALLS = {
    "nothing": b"",
    "half a preface": b"PRI * HTTP/2",
    "no message": grpc_call(CHECK),
    "half a message": grpc_call(CHECK, 1000, 10),
}


def checked(port: int) -> float:
    """Seconds that a probe takes, on a connection of its own."""
    began = time.monotonic()
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status == SERVING
    return time.monotonic() - began


@pytest.fixture
def health():
    health = Health()
    health.serving(True)
    return health


@pytest.fixture
def health_port(health) -> Iterator[int]:
    server, port = serve_health(health, "127.0.0.1:0")
    yield port
    server.stop(0).wait()


@pytest.mark.parametrize("stall", STALLS)
def test_the_health_port_answers_within_a_second_beside_100_stalled_callers(health_port, stall):
    """Two were enough to have the kubelet restart the server."""
    with Stalled(f"127.0.0.1:{health_port}", 100, STALLS[stall]):
        assert max(checked(health_port) for _ in range(3)) < 1.0


def test_what_stalled_callers_hold_of_the_health_port_is_free_again(health, monkeypatch):
    short = {"grpc.max_connection_age_ms": 200, "grpc.max_connection_age_grace_ms": 100}
    options = [(name, short.get(name, value)) for name, value in health_module._OPTIONS]
    assert set(short) <= {name for name, _ in health_module._OPTIONS}
    monkeypatch.setattr(health_module, "_OPTIONS", options)
    monkeypatch.setattr(health_module, "_MOST_CALLS", 4)
    server, port = serve_health(health, "127.0.0.1:0")
    try:
        with Stalled(f"127.0.0.1:{port}", 12, grpc_call(CHECK)) as stalled:
            stalled.wait_ended()
            time.sleep(0.3)
            assert checked(port) < 1.0
    finally:
        server.stop(0).wait()


@pytest.fixture
async def main_port(health) -> AsyncIterator[int]:
    server = grpc_server(1000, 20.0)
    health.add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield port
    await server.stop(0)


@pytest.mark.parametrize("stall", STALLS)
async def test_the_main_port_too(main_port, stall):
    with Stalled(f"127.0.0.1:{main_port}", 100, STALLS[stall]):
        assert await asyncio.to_thread(checked, main_port) < 1.0


async def ended(call: grpc.aio.Call, code: grpc.StatusCode, *words: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is code, caught.value.details()
    for word in words:
        assert word in caught.value.details()


@pytest.mark.parametrize("method", UNARY, ids=lambda method: method.name)
async def test_a_message_must_arrive_in_time(tmp_path, method: Method):
    async with Site(tmp_path, message_timeout_s=0.2) as site:

        async def never() -> AsyncIterator[bytes]:
            await asyncio.sleep(30)
            yield b""

        began = time.monotonic()
        call = site.channel.stream_unary(method.path)(never(), timeout=10)
        await ended(call, DEADLINE, "did not arrive within 0.2 s")
        assert time.monotonic() - began < 2.0
        with Stalled(site.target, 20, grpc_call(method.path, 3_000_000, 10_000)) as half:
            await asyncio.to_thread(half.wait_ended)
        await site.still_serves()


@pytest.mark.parametrize("method", UNARY, ids=lambda method: method.name)
async def test_a_message_may_be_so_large_and_no_larger(tmp_path, method: Method):
    most = LARGE_BYTES if method.name == "SubmitPrompts" else MESSAGE_BYTES
    assert method.most_bytes == most
    async with Site(tmp_path) as site:
        call = site.channel.stream_unary(method.path)
        await ended(call(iter([b"\xff" * (most + 1)]), timeout=10), FULL, str(most))
        invalid = grpc.StatusCode.INVALID_ARGUMENT
        await ended(call(iter([b"\xff" * most]), timeout=10), invalid, "is not one of this method")
        await ended(call(iter([]), timeout=10), invalid, "no message")


async def test_streams_that_announce_60_mib_are_not_waited_for(tmp_path):
    """Twelve of them, idle, cost 2 GiB. Whatever the method, what is too large is refused as soon
    as its length is known."""
    async with Site(tmp_path) as site:
        for method in (calls.SAMPLE_TREE, calls.SUBMIT_PROMPTS, calls.PUSH_WEIGHTS):
            with Stalled(site.target, 12, grpc_call(method.path, 60 << 20, 10_000)) as idle:
                began = time.monotonic()
                await asyncio.to_thread(idle.wait_ended)
                assert time.monotonic() - began < 2.0
        await site.still_serves()


async def test_more_calls_than_there_may_be_are_refused(tmp_path):
    async with Site(tmp_path, most_calls=5) as site:
        site.engine.go_on.clear()
        begun = [asyncio.create_task(site.client.sample_tree(prompt())) for _ in range(5)]
        await until(lambda: site.sampling.interactive == 5)
        stats = calls.queue_stats(None)
        await ended(stats.method.on(site.channel.unary_unary)(stats.request, timeout=5), FULL)
        site.engine.go_on.set()
        await asyncio.gather(*begun)
        await site.still_serves()


async def test_cancelling_reaches_the_tree_behind_the_limits(tmp_path):
    """The handler is called by another one, which has to pass the end on at once."""
    async with Site(tmp_path) as site:
        site.engine.go_on.clear()
        request = calls.sample_tree(prompt(), False, True).request
        call = site.raw_sampling.SampleTree(request)
        reading = asyncio.ensure_future(call.read())
        await until(lambda: len(site.engine.running) == DEFAULTS.init_rollouts)
        call.cancel()
        await until(lambda: not site.engine.running, 1.0)
        await asyncio.wait({reading})


def test_our_client_splits_what_is_too_much_for_a_call():
    small = [Prompt("x", f"{i}") for i in range(25_000)]
    large = [Prompt("x" * 1_500_000, f"{i}") for i in range(14)]
    giant = [Prompt("x" * (LARGE_BYTES + 1), "giant")]
    for prompts in (small, large, giant, [*small[:5], *giant, *large[:5]], []):
        requests = [call.request for call in calls.submit_prompts(prompts)]
        assert [p.id for request in requests for p in request.prompts] == [p.id for p in prompts]
        for request in requests:
            fits = request.ByteSize() <= LARGE_BYTES and len(request.prompts) <= calls.MOST_PROMPTS
            assert fits or [p.id for p in request.prompts] == ["giant"]
        assert len(requests) <= 3


async def test_many_prompts_are_submitted_in_several_calls(tmp_path, monkeypatch):
    monkeypatch.setattr(calls, "MOST_PROMPTS", 40)
    async with Site(tmp_path) as site:
        site.engine.go_on.clear()
        prompts = [prompt(f"Question {i}?", f"{i}") for i in range(100)]
        assert await site.client.submit_prompts(prompts) == (100, 0)
        assert await site.client.submit_prompts(prompts) == (0, 100)
        stats = await site.client.queue_stats()
        assert stats.queued + stats.growing == 100


# ---- the web port


@pytest.fixture
def web_port() -> Iterator[int]:
    server, port = serve_metrics(Metrics(), "127.0.0.1:0")
    yield port
    server.shutdown()
    server.server_close()


def fetched(port: int) -> float:
    began = time.monotonic()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        assert b"ibtpo_" in response.read()
    return time.monotonic() - began


@pytest.mark.parametrize("data", [b"", b"GET /metrics HT", b"GET /metrics HTTP/1.1\r\nHost: x\r\n"])
def test_the_web_port_answers_beside_100_half_sent_requests(web_port, data):
    with Stalled(f"127.0.0.1:{web_port}", 100, data):
        assert fetched(web_port) < 1.0


def test_half_sent_requests_hold_no_thread_for_long(web_port, monkeypatch):
    """Also one that goes on and on, byte by byte."""
    monkeypatch.setattr(web, "_ARRIVAL_S", 0.4)
    before = threading.active_count()
    with Stalled(f"127.0.0.1:{web_port}", 20, b"GET /metrics HT") as half:
        time.sleep(0.2)
        end = time.monotonic() + 5.0
        while threading.active_count() > before:
            assert time.monotonic() < end
            for connection in half.sockets:
                with suppress(OSError):
                    connection.sendall(b"x")
            time.sleep(0.05)
    assert fetched(web_port) < 1.0


def test_more_requests_than_there_may_be_are_turned_away(monkeypatch):
    monkeypatch.setattr(web, "_MOST_REQUESTS", 2)
    server, port = serve_metrics(Metrics(), "127.0.0.1:0")
    try:
        with Stalled(f"127.0.0.1:{port}", 5, b"GET") as half:
            closed = [connection.recv(1) for connection in half.sockets[2:]]
            assert closed == [b""] * 3
        time.sleep(0.1)
        assert fetched(port) < 1.0
    finally:
        server.shutdown()
        server.server_close()


def test_a_long_request_is_not_read(web_port):
    request = b"GET /" + b"x" * 100_000
    with Stalled(f"127.0.0.1:{web_port}", 1, request) as long, suppress(ConnectionError):
        assert long.sockets[0].recv(1) == b""
