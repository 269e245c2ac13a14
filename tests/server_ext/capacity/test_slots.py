"""Slots for rollouts: never too many, each kind its share, even between trees, nothing lost."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server_ext.capacity.shares import Kind, Shares, shares_of
from server_ext.capacity.slots import Slots

CALL, QUEUED = Kind.CALL, Kind.QUEUED


class Rollouts:
    """Tasks that take a slot and keep it until they are told to end."""

    def __init__(self, count: int, call_share: float = 0.75) -> None:
        self.now_s = 0.0
        self.slots = Slots(count, Shares(shares_of(call_share), lambda: self.now_s))
        self.turns: list[str] = []
        self.tasks: dict[asyncio.Task[None], tuple[str, asyncio.Event]] = {}
        self.holding: set[asyncio.Task[None]] = set()

    def start(self, tree: str, kind: Kind = QUEUED) -> asyncio.Task[None]:
        end = asyncio.Event()

        async def roll() -> None:
            async with self.slots.slot(tree, kind):
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

    def cancel(self) -> None:
        for task in self.tasks:
            task.cancel()

    async def end_all(self) -> None:
        """Those that have a slot end, after a second."""
        self.now_s += 1.0
        held = [*self.holding]
        for task in held:
            self.tasks[task][1].set()
        await asyncio.wait(held)
        await self.settle()

    async def end_one(self, tree: str | None = None) -> None:
        task = next(
            task
            for task, (name, _) in self.tasks.items()
            if task in self.holding and (tree is None or name.startswith(tree))
        )
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


@pytest.mark.parametrize(("slots", "call_share"), [(1, 0.5), (1, 0.75), (4, 0.9), (12, 0.75)])
async def test_both_kinds_have_their_share_while_both_want_more(slots, call_share):
    """Calls that never end to come leave queued prompts their part, and the other way round."""
    rollouts = Rollouts(slots, call_share)
    for at in range(slots * 50):
        rollouts.start(f"call{at}", CALL)
        rollouts.start(f"tree{at}", QUEUED)
    await rollouts.settle()
    for _ in range(40):
        await rollouts.end_all()
    calls = sum(tree.startswith("call") for tree in rollouts.turns) / len(rollouts.turns)
    assert calls == pytest.approx(call_share, abs=0.05)
    rollouts.cancel()


async def test_shares_are_of_time_not_of_turns():
    """Calls are short, rollouts of queued prompts ten times as long."""
    rollouts = Rollouts(1, call_share=0.75)
    for at in range(300):
        rollouts.start(f"call{at}", CALL)
        rollouts.start(f"tree{at}", QUEUED)
    await rollouts.settle()
    held_s = Counter[str]()
    for _ in range(300):
        [task] = rollouts.holding
        kind = rollouts.tasks[task][0][:4]
        lasts_s = 1.0 if kind == "call" else 10.0
        held_s[kind] += lasts_s
        rollouts.now_s += lasts_s
        await rollouts.end_one()
    assert held_s["call"] / held_s.total() == pytest.approx(0.75, abs=0.05)
    rollouts.cancel()


@pytest.mark.parametrize("alone", [CALL, QUEUED])
async def test_a_kind_has_what_the_other_does_not_want(alone):
    """And none later for it: the other has its share at once, not all that it never asked for."""
    rollouts, other = Rollouts(4, call_share=0.5), QUEUED if alone is CALL else CALL
    for at in range(400):
        rollouts.start(f"alone{at}", alone)
    await rollouts.settle()
    for _ in range(50):
        assert len(rollouts.holding) == 4
        await rollouts.end_all()
    for at in range(400):
        rollouts.start(f"other{at}", other)
    began = len(rollouts.turns)
    for _ in range(20):
        await rollouts.end_all()
    others = [tree.startswith("other") for tree in rollouts.turns[began:]]
    assert 0.4 <= sum(others) / len(others) <= 0.6
    rollouts.cancel()


async def test_who_comes_while_the_other_has_all_slots_has_the_next_ones():
    """Until it has its share: not after all that the other began before."""
    rollouts = Rollouts(8, call_share=0.75)
    for at in range(100):
        rollouts.start(f"tree{at}", QUEUED)
    await rollouts.settle()
    for _ in range(5):
        await rollouts.end_all()
    for at in range(100):
        rollouts.start(f"call{at}", CALL)
    began = len(rollouts.turns)
    rollouts.now_s += 1.0
    for _ in range(6):
        await rollouts.end_one("tree")
    assert [tree[:4] for tree in rollouts.turns[began:]] == ["call"] * 6
    rollouts.cancel()


async def test_a_kind_that_was_alone_for_long_owes_nothing():
    """It may be idle for a while, and the other have all, before both want some."""
    rollouts = Rollouts(2, call_share=0.5)
    for kind in (CALL, QUEUED):
        for at in range(100):
            rollouts.start(f"{kind.value}{at}", kind)
        await rollouts.settle()
        for _ in range(50 if kind is CALL else 5):
            await rollouts.end_all()
    for at in range(100):
        rollouts.start(f"again{at}", CALL)
    began = len(rollouts.turns)
    for _ in range(20):
        await rollouts.end_all()
    again = [tree.startswith("again") for tree in rollouts.turns[began:]]
    assert 0.4 <= sum(again) / len(again) <= 0.6
    rollouts.cancel()


async def test_queued_prompts_are_wanted_while_calls_have_all_the_slots():
    """Else no tree of theirs would be opened that could claim its share."""
    rollouts = Rollouts(8, call_share=0.75)
    assert (rollouts.slots.unclaimed(QUEUED), rollouts.slots.unclaimed(CALL)) == (8, 8)
    for at in range(20):
        rollouts.start(f"call{at}", CALL)
    await rollouts.settle()
    assert (rollouts.slots.unclaimed(QUEUED), rollouts.slots.unclaimed(CALL)) == (2, 0)
    rollouts.start("tree")
    await rollouts.settle()
    assert rollouts.slots.unclaimed(QUEUED) == 0, "one waits"
    await rollouts.end_one()
    assert rollouts.turns[-1] == "tree"
    assert rollouts.slots.unclaimed(QUEUED) == 1
    rollouts.cancel()


async def test_nothing_is_kept_of_trees_that_are_gone():
    """Whether they had a slot, waited for one, or gave up."""
    rollouts = Rollouts(1)
    for tree in ("a", "b", "c"):
        for kind in Kind:
            rollouts.start(tree, kind)
    await rollouts.settle()
    rollouts.slots.give_up("b")
    rollouts.cancel()
    await asyncio.gather(*rollouts.tasks, return_exceptions=True)
    state = str(vars(rollouts.slots)) + str(vars(rollouts.slots._shares))
    assert not any(repr(tree) in state for tree in ("a", "b", "c")), state


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
                    rollouts.start(rng.choice("abc"), rng.choice([CALL, QUEUED]))
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
