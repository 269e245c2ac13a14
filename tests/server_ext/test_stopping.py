"""What a signal stops, and in which order: services and producer on a fake engine."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict

import grpc
import pytest

from ibtree.client import RpcFailed
from ibtree.messages import QueueStats
from server_ext.services.health import Health
from server_ext.stopping import drain
from tests import ROOT
from tests.server_ext.fakes import FakeEngine, until
from tests.server_ext.site import DEFAULTS, Site, prompt


class Paced(FakeEngine):
    """Lets a number of rollouts of each tree through; more wait for `more`."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed: dict[str, int] = defaultdict(int)
        self.more = asyncio.Event()

    def begun(self) -> set[str]:
        """Trees that have had a request."""
        return {rid.partition("/")[0] for rid in self.requests}

    async def _may_go_on(self, aborted: asyncio.Event) -> None:
        tree = next(rid for rid, event in self.running.items() if event is aborted)
        tree = tree.partition("/")[0]
        if self.allowed[tree] > 0:
            self.allowed[tree] -= 1
            return
        self.go_on = self.more
        await super()._may_go_on(aborted)


@pytest.fixture
async def site(tmp_path):
    async with Site(tmp_path, max_open_trees=2, max_calls=1) as site:
        paced = Paced()
        site.engine.__class__ = Paced
        site.engine.allowed, site.engine.more = paced.allowed, paced.more
        yield site
        site.engine.more.set()


async def stopped(site: Site, grace_s: float = 20.0, at_once: asyncio.Event | None = None) -> None:
    at_once = at_once or asyncio.Event()
    await drain(site.server, Health(), site.producer, site.sampling, grace_s, at_once)


async def stats(site: Site) -> QueueStats:
    """The port is closed: as the journal says."""
    counts = await site.journal(type(site.journal._journal).counts)
    return QueueStats(**{state.value: count for state, count in counts.items()}, interactive=0)


def age(site: Site, seconds: float) -> None:
    """The growing trees began so much earlier."""
    for job in site.forest._since:
        site.forest._since[job] -= seconds


async def test_no_tree_begins_any_more(site):
    await site.client.submit_prompts([prompt("Q?", f"q{n}") for n in range(6)])
    await until(lambda: len(site.engine.begun()) == 2)
    begun = site.engine.begun()
    stop = asyncio.create_task(stopped(site))
    await asyncio.sleep(0.05)
    site.engine.more.set()
    await stop
    assert site.engine.begun() == begun
    assert await stats(site) == QueueStats(queued=4, graded=2)


async def test_the_grace_goes_to_the_trees_nearest_to_their_end(site):
    await site.client.submit_prompts([prompt("Q?", "near"), prompt("Q?", "far")])
    site.engine.allowed |= {"near": DEFAULTS.trajectories - 1, "far": DEFAULTS.init_rollouts}
    await until(lambda: len(site.engine.running) == 2)
    age(site, 20.0)
    began = time.monotonic()
    stop = asyncio.create_task(stopped(site, 10.0))
    await until(lambda: list(site.forest._samplers.values())[1:] == [])  # `far` has left at once
    assert not stop.done()
    site.engine.more.set()
    await stop
    assert time.monotonic() - began < 5
    assert await stats(site) == QueueStats(queued=1, graded=1)


async def test_the_grace_ends(site):
    await site.client.submit_prompts([prompt("Q?", "a"), prompt("Q?", "b")])
    await until(lambda: len(site.engine.begun()) == 2)
    began = time.monotonic()
    await stopped(site, 0.3)
    assert 0.3 <= time.monotonic() - began < 3
    assert await stats(site) == QueueStats(queued=2)


async def test_a_second_signal_does_not_wait(site):
    await site.client.submit_prompts([prompt("Q?", "a")])
    call = asyncio.create_task(site.client.sample_tree(prompt("Q?"), timeout_s=30))
    await until(lambda: len(site.engine.begun()) == 2)
    at_once, began = asyncio.Event(), time.monotonic()
    stop = asyncio.create_task(stopped(site, 60.0, at_once))
    await asyncio.sleep(0.1)
    assert not stop.done()
    at_once.set()
    await stop
    assert time.monotonic() - began < 5
    call.cancel()
    await asyncio.wait({call})
    assert await stats(site) == QueueStats(queued=1)


async def test_calls_in_flight_end_and_those_that_wait_are_told(site):
    growing = asyncio.create_task(site.client.sample_tree(prompt("Q?"), timeout_s=30))
    await until(lambda: len(site.engine.begun()) == 1)
    request = _request("waits")
    waiting = site.raw_sampling.SampleTree(request, timeout=30)
    await until(lambda: site.sampling.interactive == 2)
    stop = asyncio.create_task(stopped(site))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await waiting.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "stopping" in caught.value.details()
    site.engine.more.set()
    await stop
    assert (await growing).trajectories == DEFAULTS.trajectories
    assert len(site.engine.begun()) == 1


async def test_a_learner_that_waits_for_trees_does_not_hold_the_stop(site):
    leasing = asyncio.create_task(site.client.lease_trees(1, wait_s=30))
    await asyncio.sleep(0.2)
    began = time.monotonic()
    await stopped(site, 20.0)
    assert time.monotonic() - began < 3
    try:
        assert await leasing == []
    except RpcFailed as error:
        assert "UNAVAILABLE" in str(error)


async def test_a_tree_that_is_being_stored_is_not_thrown_away(site, monkeypatch):
    """It has ended, and is no longer among those that grow."""
    await site.client.submit_prompts([prompt("Q?", "a")])
    await until(lambda: len(site.engine.begun()) == 1)
    held = asyncio.Event()
    off_loop = site.forest.off_loop

    async def slowly(function, *arguments):
        if function is site.producer._encode:
            await held.wait()
        return await off_loop(function, *arguments)

    monkeypatch.setattr(site.forest, "off_loop", slowly)
    site.engine.more.set()
    await until(lambda: any(growth.grown for growth in site.producer._growths.values()))
    stop = asyncio.create_task(stopped(site))
    await asyncio.sleep(0.05)
    held.set()
    await stop
    assert await stats(site) == QueueStats(graded=1)


CHILD = """
import asyncio
from server_ext.stopping import Signals

async def main():
    signals = Signals()
    signals.take()
    print("ready", flush=True)
    await signals.asked.wait()
    print("asked", flush=True)
    await signals.at_once.wait()
    print("at once", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_three_signals():
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        for line in ("ready", "asked", "at once"):
            assert child.stdout.readline().strip() == line
            os.kill(child.pid, signal.SIGTERM)
        assert child.wait(10) == -signal.SIGTERM
    finally:
        child.kill()


def _request(id_: str):
    from ibtree.wire.v1 import sampling_pb2

    return sampling_pb2.SampleTreeRequest(prompt=sampling_pb2.Prompt(id=id_, text="Q?", answer="1"))
