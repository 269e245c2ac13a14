"""The rollouts of one tree: what becomes of one that is on its way when the tree is aborted."""

from __future__ import annotations

import asyncio

import pytest

from ibtree.tree import Finish, Tree
from server_ext.capacity.shares import Shares, shares_of
from server_ext.capacity.slots import Slots
from server_ext.trees.job import Job
from server_ext.trees.off_loop import OffLoop
from server_ext.trees.sampler import SamplerParts, TreeSampler
from tests.server_ext.fakes import FakeEngine, ToyTokenizer
from tests.server_ext.site import DEFAULTS


class One:
    """A tree's sampler, on an engine with one slot, which another tree has."""

    def __init__(self, prompt: tuple[int, ...]) -> None:
        self.engine, self.slots = FakeEngine(), Slots(1, Shares(shares_of(0.5)))
        parts = SamplerParts(self.engine, ToyTokenizer(), self.slots, OffLoop("rollouts"))
        self.tree = Tree(prompt=prompt, options=DEFAULTS)
        self.sampler = TreeSampler(parts, Job("t", prompt, "1", "exact", DEFAULTS), "t", 0)
        self.taken = self.slots.slot("another")

    async def rolling(self) -> asyncio.Task:
        await self.taken.__aenter__()
        rolling = asyncio.create_task(self.sampler.roll(self.tree, 0, 0))
        for _ in range(5):
            await asyncio.sleep(0)
        return rolling


@pytest.mark.parametrize("prompt", [(65,), (65,) * 80], ids=["short", "computed once before"])
async def test_a_slot_that_comes_in_the_turn_of_the_deadline_begins_nothing(prompt):
    """The rollout was not in the engine yet when the tree's others were aborted, and went there
    after that: the tree ended ten seconds late."""
    one = One(prompt)
    one.engine.go_on.clear()
    rolling = await one.rolling()
    await one.taken.__aexit__(None, None, None)
    one.sampler.abort(one.tree)
    rollout = await asyncio.wait_for(rolling, 1)
    assert (rollout.finish, rollout.steps) == (Finish.NONE, [])
    assert not one.engine.requests and one.slots.in_flight == 0


async def test_a_rollout_that_starts_after_the_abort_begins_nothing():
    one = One((65,))
    one.sampler.abort(one.tree)
    rollout = await asyncio.wait_for(await one.rolling(), 1)
    assert (rollout.finish, rollout.steps) == (Finish.NONE, [])
    assert not one.engine.requests
