"""Slots for rollouts: never too many, urgent trees first, then evenly, nothing lost."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from server_ext.capacity.slots import Slots


class Rollouts:
    """Tasks that take a slot and keep it until they are told to end."""

    def __init__(self, count: int) -> None:
        self.slots = Slots(count)
        self.turns: list[str] = []
        self.tasks: dict[asyncio.Task[None], tuple[str, asyncio.Event]] = {}
        self.holding: set[asyncio.Task[None]] = set()

    def start(self, tree: str, urgent: bool = False) -> asyncio.Task[None]:
        end = asyncio.Event()

        async def roll() -> None:
            async with self.slots.slot(tree, urgent=urgent):
                self.turns.append(tree)
                me = asyncio.current_task()
                self.holding.add(me)
                try:
                    await end.wait()
                finally:
                    self.holding.discard(me)

        task = asyncio.create_task(roll())
        self.tasks[task] = tree, end
        return task

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def end_one(self, tree: str | None = None) -> None:
        task = next(t for t in self.tasks if t in self.holding and tree in (None, self.tasks[t][0]))
        self.tasks[task][1].set()
        await task
        await self.settle()


async def test_never_more_than_there_are_slots():
    rollouts = Rollouts(3)
    for i in range(10):
        rollouts.start(f"tree{i}")
    await rollouts.settle()
    for ended in range(10):
        assert len(rollouts.holding) == rollouts.slots.in_flight == min(3, 10 - ended)
        await rollouts.end_one()
    assert rollouts.turns == [f"tree{i}" for i in range(10)], "in the order they came"


async def test_trees_get_equal_numbers():
    """One with many rollouts waiting does not hold up one that comes later."""
    rollouts = Rollouts(4)
    for _ in range(12):
        rollouts.start("large")
    await rollouts.settle()
    for _ in range(4):
        rollouts.start("late")
    await rollouts.end_one("large")
    await rollouts.end_one("large")
    slots_of = Counter(rollouts.tasks[task][0] for task in rollouts.holding)
    assert slots_of == {"large": 2, "late": 2}
    await rollouts.end_one("late")
    assert Counter(rollouts.tasks[task][0] for task in rollouts.holding) == slots_of


async def test_urgent_trees_go_first():
    rollouts = Rollouts(1)
    for tree in ("a", "b", "c"):
        rollouts.start(tree)
    await rollouts.settle()
    for _ in range(3):
        rollouts.start("urgent", urgent=True)
    for _ in range(6):
        await rollouts.end_one()
    assert rollouts.turns == ["a", "urgent", "urgent", "urgent", "b", "c"]


async def test_a_tree_that_gives_up_leaves_the_line():
    rollouts = Rollouts(1)
    first, *waiting = [rollouts.start(tree) for tree in ("a", "b", "b", "c")]
    await rollouts.settle()
    rollouts.slots.give_up("b")
    await rollouts.settle()
    assert [task.cancelled() for task in waiting] == [True, True, False]
    await rollouts.end_one("a")
    assert first.done() and rollouts.turns == ["a", "c"]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**32), st.integers(5, 60))
def test_no_slot_is_lost_whatever_is_cancelled_when(slots, seed, moves):
    async def life() -> None:
        rng, rollouts = random.Random(seed), Rollouts(slots)
        for _ in range(moves):
            match rng.choice(["start", "start", "cancel", "end", "give up", "turn"]):
                case "start":
                    rollouts.start(rng.choice("abc"), urgent=rng.random() < 0.3)
                case "cancel" if rollouts.tasks:
                    rng.choice(list(rollouts.tasks)).cancel()
                case "end" if rollouts.holding:
                    rollouts.tasks[rng.choice(list(rollouts.holding))][1].set()
                case "give up":
                    rollouts.slots.give_up(rng.choice("abc"))
                case "turn":
                    await asyncio.sleep(0)
            assert len(rollouts.holding) <= slots
        for _, end in rollouts.tasks.values():
            end.set()
        await asyncio.wait_for(asyncio.gather(*rollouts.tasks, return_exceptions=True), 5)
        assert rollouts.slots.in_flight == 0
        last = [rollouts.start("z") for _ in range(slots)]
        await rollouts.settle()
        assert len(rollouts.holding) == slots, "every slot can be had again"
        for task in last:
            task.cancel()
        await asyncio.gather(*last, return_exceptions=True)

    asyncio.run(life())
