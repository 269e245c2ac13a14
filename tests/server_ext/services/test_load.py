"""Calls and queued prompts at once: neither starves the other, and deadlines hold while waiting."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from ibtree.client import RpcFailed
from ibtree.tree import StopCause
from tests.server_ext.fakes import until
from tests.server_ext.site import DEFAULTS, Site, prompt


@pytest.fixture
def slow_rollouts(monkeypatch):
    """A rollout lasts 2 ms; says how often each tree had its turn."""

    def slow(site: Site) -> None:
        generate = site.engine.generate

        async def after_a_while(*request, **more):
            await asyncio.sleep(0.002)
            return await generate(*request, **more)

        monkeypatch.setattr(site.engine, "generate", after_a_while)

    return slow


@pytest.mark.parametrize("max_rollouts", [1, 4])
async def test_calls_that_never_cease_leave_queued_prompts_their_share(
    tmp_path, slow_rollouts, max_rollouts
):
    """Strict priority gave them 16 turns while calls had 2,520."""
    async with Site(tmp_path, max_rollouts=max_rollouts, max_calls=64) as site:
        slow_rollouts(site)

        async def calls() -> None:
            while True:
                await site.client.sample_tree(prompt(id="call"))

        callers = [asyncio.create_task(calls()) for _ in range(8)]
        await until(lambda: len(site.engine.requests) > 50)
        before = len(site.engine.requests)
        await site.client.submit_prompts([prompt(f"Question {i}?", f"{i}") for i in range(200)])
        await until(lambda: len(site.engine.requests) > before + 400, 30)
        turns = site.engine.requests[before:]
        for caller in callers:
            caller.cancel()
        await asyncio.wait(callers)
        of_calls = sum(rid.startswith("call") for rid in turns) / len(turns)
        assert 0.6 < of_calls < 0.9
        assert (await site.client.queue_stats()).graded > 0


async def test_a_call_does_not_wait_for_queued_trees_to_make_room_in_the_cache(tmp_path):
    async with Site(tmp_path, cache_tokens=500, max_open_trees=4) as site:
        site.engine.go_on.clear()
        await site.client.submit_prompts([prompt(id=f"{i}") for i in range(4)])
        await until(lambda: site.engine.running)
        await asyncio.sleep(0.05)
        assert len({rid[0] for rid in site.engine.running}) == 1, "the cache holds one tree"
        call = asyncio.create_task(site.client.sample_tree(prompt(id="call")))
        await until(lambda: any(rid.startswith("call") for rid in site.engine.running))
        site.engine.go_on.set()
        assert (await call).trajectories == DEFAULTS.trajectories


@pytest.mark.parametrize(
    ("limits", "waits_for"),
    [({"max_calls": 1}, "a permit"), ({"cache_tokens": 1}, "room in the cache")],
)
async def test_a_calls_deadline_runs_while_it_waits(tmp_path, limits, waits_for):
    async with Site(tmp_path, **limits) as site:
        site.engine.go_on.clear()
        first = asyncio.create_task(site.client.sample_tree(prompt(id="first")))
        await until(lambda: site.engine.running)
        began = time.monotonic()
        with pytest.raises(RpcFailed, match=f"waited for {waits_for}") as caught:
            await site.client.sample_tree(prompt(id="late", deadline_s=0.2))
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert 0.15 < time.monotonic() - began < 2.0
        site.engine.go_on.set()
        await first
        await site.still_serves()


async def test_what_a_call_waited_is_taken_from_its_deadline(tmp_path):
    async with Site(tmp_path, max_calls=1) as site:
        site.engine.go_on.clear()
        first = asyncio.create_task(site.client.sample_tree(prompt(id="first")))
        await until(lambda: site.engine.running)
        written, fourths = site.engine.write, []

        def write(ids, number):
            """The fifth rollout of the second tree hangs."""
            fourths.extend([number] * (number == 3))
            if number == 3 and len(fourths) == 2:
                site.engine.go_on.clear()
            return written(ids, number)

        site.engine.write = write
        began = time.monotonic()
        late = asyncio.create_task(site.client.sample_tree(prompt(id="late", deadline_s=1.0)))
        await asyncio.sleep(0.6)
        site.engine.go_on.set()
        await first
        tree = await late
        assert tree.stop_cause is StopCause.DEADLINE
        assert time.monotonic() - began < 1.4
        site.engine.go_on.set()
