"""The gate: many rollouts or one update, whoever gives up on the way."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack, suppress

import pytest

from server_ext.capacity.gate import Gate
from server_ext.errors import StillBusy
from tests.server_ext.fakes import until


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


class Visitor:
    """A rollout, or an update if `drain_s` is given, that stays inside until told to leave."""

    def __init__(self, gate: Gate, drain_s: float | None = None) -> None:
        self.inside, self.leave = False, asyncio.Event()
        self._way_in = gate.rollout() if drain_s is None else gate.update(drain_s)
        self.task = asyncio.create_task(self._visit())

    async def _visit(self) -> None:
        async with self._way_in:
            self.inside = True
            try:
                await self.leave.wait()
            finally:
                self.inside = False

    async def done(self) -> None:
        self.leave.set()
        await asyncio.wait_for(self.task, 5)

    async def cancel(self) -> None:
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait_for(self.task, 5)


async def check_usable(gate: Gate) -> None:
    """Rollouts and an update still get in, one after the other."""
    for drain_s in (None, 5.0, None):
        visitor = Visitor(gate, drain_s)
        await until(lambda v=visitor: v.inside)
        await visitor.done()
    assert gate._inside == 0


async def test_many_rollouts_at_once():
    gate = Gate()
    rollouts = [Visitor(gate) for _ in range(50)]
    await until(lambda: all(r.inside for r in rollouts))
    assert gate._inside == 50
    for r in rollouts:
        await r.done()
    assert gate._inside == 0


async def test_an_update_waits_for_those_inside_and_blocks_new_ones():
    gate = Gate()
    first, second = Visitor(gate), Visitor(gate)
    await settle()
    update = Visitor(gate, 5.0)
    await settle()
    late = [Visitor(gate) for _ in range(3)]
    await settle()
    assert gate._inside == 2
    assert not update.inside
    assert not any(r.inside for r in late)
    await first.done()
    await settle()
    assert not update.inside
    await second.done()
    await until(lambda: update.inside)
    await settle()
    assert not any(r.inside for r in late)
    await update.done()
    await until(lambda: all(r.inside for r in late))
    for r in late:
        await r.done()
    await check_usable(gate)


async def test_a_second_update_waits_for_the_first():
    gate = Gate()
    first = Visitor(gate, 5.0)
    await until(lambda: first.inside)
    second = Visitor(gate, 5.0)
    await settle()
    assert not second.inside
    await first.done()
    await until(lambda: second.inside)
    await second.done()
    await check_usable(gate)


async def test_a_drain_timeout_opens_the_gate_again():
    gate = Gate()
    slow = Visitor(gate)
    await settle()
    update = Visitor(gate, 0.02)
    await settle()
    waiting = Visitor(gate)
    with pytest.raises(StillBusy):
        await asyncio.wait_for(update.task, 5)
    await until(lambda: waiting.inside)
    assert slow.inside
    assert not update.inside
    await slow.done()
    await waiting.done()
    await check_usable(gate)


async def test_an_error_inside_opens_the_gate_again():
    gate = Gate()
    for enter in (gate.rollout, lambda: gate.update(1.0)):
        for error in (ZeroDivisionError, TimeoutError):  # not to be taken for a drain timeout
            with pytest.raises(error) as caught:
                async with enter():
                    raise error
            assert caught.type is error
    await check_usable(gate)


@pytest.mark.parametrize("drain_s", [None, 5.0])
async def test_cancelling_who_waits_leaves_the_gate_usable(drain_s):
    """A rollout that waits for an update, and an update that waits for another."""
    gate = Gate()
    update = Visitor(gate, 5.0)
    await until(lambda: update.inside)
    waiting = Visitor(gate, drain_s)
    await settle()
    await waiting.cancel()
    assert update.inside
    await update.done()
    await check_usable(gate)


async def test_cancelling_a_draining_update_lets_the_rollouts_on():
    gate = Gate()
    inside = Visitor(gate)
    await settle()
    update = Visitor(gate, 5.0)
    await settle()
    waiting = Visitor(gate)
    await settle()
    await update.cancel()
    await until(lambda: waiting.inside)
    await inside.done()
    await waiting.done()
    await check_usable(gate)


async def test_cancelling_who_is_inside_leaves_the_gate_usable():
    gate = Gate()
    for drain_s in (None, 5.0):
        visitor = Visitor(gate, drain_s)
        await until(lambda v=visitor: v.inside)
        await visitor.cancel()
        await check_usable(gate)


async def test_cancelling_the_last_rollout_lets_the_update_in():
    gate = Gate()
    rollout = Visitor(gate)
    await settle()
    update = Visitor(gate, 5.0)
    await settle()
    await rollout.cancel()
    await until(lambda: update.inside)
    await update.done()
    await check_usable(gate)


@pytest.mark.parametrize("seed", range(5))
async def test_never_both_inside(seed):
    """Random visitors with random drain timeouts, cancelled at random."""
    rng, gate, now = random.Random(seed), Gate(), {"rollout": 0, "update": 0}
    entered = {"rollout": 0, "update": 0}

    async def visit(kind: str) -> None:
        for _ in range(rng.randrange(30)):
            await asyncio.sleep(0)
        async with AsyncExitStack() as stack:
            with suppress(StillBusy):
                drain_s = rng.choice([0.0, 0.001, 1.0])
                way_in = gate.rollout() if kind == "rollout" else gate.update(drain_s)
                await stack.enter_async_context(way_in)
                now[kind] += 1
                entered[kind] += 1
                try:
                    for _ in range(rng.randrange(10)):
                        assert now["update"] <= 1
                        assert not (now["update"] and now["rollout"])
                        assert gate._inside == now["rollout"]
                        await asyncio.sleep(0)
                finally:
                    now[kind] -= 1

    kinds = rng.choices(["rollout", "update"], [6, 1], k=300)
    tasks = [asyncio.create_task(visit(kind)) for kind in kinds]
    for task in rng.sample(tasks, 80):
        await asyncio.sleep(0)
        task.cancel()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
    assert not [r for r in results if r and not isinstance(r, asyncio.CancelledError)]
    assert min(entered.values()) > 3
    await check_usable(gate)
