"""Health: on its own port from the first second on, and on the main one."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ibtree.wire.v1 import cache_pb2, queue_pb2, sampling_pb2, weights_pb2
from server_ext.services import health as health_module
from server_ext.services.health import SERVICES, Health, serve_health
from tests import ROOT

Request, Status = health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
SERVING, NOT_SERVING = Status.SERVING, Status.NOT_SERVING


@pytest.fixture
def health():
    return Health()


@pytest.fixture
def stub(health):
    """A client of the health port."""
    server, port = serve_health(health, "127.0.0.1:0")
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    yield health_pb2_grpc.HealthStub(channel)
    channel.close()
    server.stop(0).wait()


@pytest.fixture
async def main_stub(health):
    """A client of the main port, where the event loop answers."""
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield health_pb2_grpc.HealthStub(channel)
    await server.stop(0)


def statuses(stub) -> set[int]:
    return {stub.Check(Request(service=name), timeout=5).status for name in SERVICES}


def test_not_serving_until_told(health, stub):
    assert statuses(stub) == {NOT_SERVING}
    health.beat()
    assert statuses(stub) == {NOT_SERVING}
    health.serving(True)
    assert statuses(stub) == {SERVING}
    health.serving(False)
    assert statuses(stub) == {NOT_SERVING}


def test_the_services_are_those_of_the_contract():
    names = {
        service.full_name
        for module in (cache_pb2, queue_pb2, sampling_pb2, weights_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
    }
    assert set(SERVICES) == {"", *names}


def test_a_hung_event_loop_shows(health, stub, monkeypatch):
    health.serving(True)
    health.beat()
    monkeypatch.setattr(health_module, "_STALE_S", 0.1)
    end = time.monotonic() + 5
    while statuses(stub) != {NOT_SERVING}:
        assert time.monotonic() < end
    health.beat()
    assert stub.Check(Request(), timeout=5).status == SERVING


def test_an_unknown_service_is_not_found(stub):
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(Request(service="nope"), timeout=5)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_watching_is_not_offered(stub):
    """A watcher would hold a thread that probes need; gRPC clients cope with UNIMPLEMENTED."""
    with pytest.raises(grpc.RpcError) as caught:
        next(stub.Watch(Request(), timeout=10))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_watchers_do_not_keep_probes_out(stub):
    """A probe that is turned away looks like a dead server."""
    calls = [stub.Watch(Request(), timeout=10) for _ in range(12)]
    threads = [threading.Thread(target=lambda c=c: drain(c), daemon=True) for c in calls]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    try:
        for _ in range(5):
            assert stub.Check(Request(), timeout=5).status == NOT_SERVING
    finally:
        for call in calls:
            call.cancel()


def drain(call) -> None:
    try:
        for _ in call:
            pass
    except grpc.RpcError:
        pass


def test_a_port_in_use_is_an_error(health):
    server, port = serve_health(health, "127.0.0.1:0")
    with pytest.raises(RuntimeError):
        serve_health(health, f"127.0.0.1:{port}")
    server.stop(0).wait()


async def test_on_the_main_port(health, main_stub):
    assert (await main_stub.Check(Request(), timeout=5)).status == NOT_SERVING
    health.serving(True)
    for name in SERVICES:
        assert (await main_stub.Check(Request(service=name), timeout=5)).status == SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await main_stub.Check(Request(service="nope"), timeout=5)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_watching_on_the_main_port():
    """Watchers, taken or turned away, hold no thread that updates and probes need, and do not
    keep the process alive."""
    command = [sys.executable, "-m", "tests.server_ext.services.health_child", "40"]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        said, _ = child.communicate(timeout=8)
    except subprocess.TimeoutExpired:
        child.kill()
        said, _ = child.communicate()
    expected = ["a thread is free 1", "checked 1", "ended"]
    assert said.splitlines() == expected
