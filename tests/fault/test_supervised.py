"""A server as an operator starts it: stuck, killed from the inside, and told to stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from processes import Process, server_command, wait_until_serving

from ibtree import Client
from tests.fault.test_kills import wait_for
from tests.loop.test_engine import prompt

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def below(pid: int) -> set[int]:
    """A process's descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    own = {int(word) for word in children.read_text().split()} if children.exists() else set()
    return own.union(*map(below, own)) if own else own


def named(pids: set[int], name: str) -> list[int]:
    found = []
    for pid in pids:
        line = Path(f"/proc/{pid}/cmdline")
        if line.exists() and name in line.read_text():
            found.append(pid)
    return found


def status(address: str) -> int:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            return stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status
        except grpc.RpcError:
            return -1


@pytest.fixture
def supervised(server, tmp_path: Path) -> Iterator[Process]:
    """The session's engine makes room: one engine at a time."""
    server.stop()
    options = ("--supervise", "--stuck-after-s=10")
    process = Process(server_command(tmp_path / "data", *options), tmp_path / "server.log")
    try:
        yield process
    finally:
        process.stop()
        server.start()


@pytest.mark.timeout(900)
def test_stuck_killed_and_told_to_stop(supervised: Process) -> None:
    _, health, _ = wait_until_serving(supervised)
    first = below(supervised.popen.pid)
    (scheduler,) = named(first, "sglang::scheduler")
    wait_for(lambda: status(health) == SERVING, 30, "health")

    # alive but stuck: everything runs but the scheduler
    os.kill(scheduler, signal.SIGSTOP)
    wait_for(lambda: status(health) == NOT_SERVING, 60, "sign of a stuck scheduler")
    os.kill(scheduler, signal.SIGCONT)
    wait_for(lambda: status(health) == SERVING, 60, "sign of work that moves")

    # SGLang answers a dead scheduler by killing the server; the supervisor starts it again
    os.kill(scheduler, signal.SIGKILL)
    wait_for(lambda: "it is started again in 1 s" in supervised.said(), 60, "death")
    wait_for(lambda: supervised.said().count("ibtpo-server: serving on") == 2, 180, "second life")
    assert not first & below(supervised.popen.pid)
    again = supervised.said().rpartition("serving on ")[2].split()[0]
    with Client(again) as client:
        assert client.sample_tree(prompt(0), timeout_s=60).trajectories

    # passed on, and its status is the server's
    second = below(supervised.popen.pid)
    supervised.popen.terminate()
    assert supervised.popen.wait(60) == 0
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in second):
        assert time.monotonic() < until
        time.sleep(0.1)
