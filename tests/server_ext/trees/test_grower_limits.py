"""How a tree ends early: budgets, deadlines, cancellation, failures."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest

from ibtree.tree import Finish, StopCause
from server_ext.errors import GrowthError, RolloutLostError
from server_ext.trees import grower as grower_module
from server_ext.trees.grower import Rollout
from server_ext.trees.strategies import IbScore
from tests.ibtree.tree.growing import find
from tests.server_ext.fakes import until
from tests.server_ext.trees.process import Growth, Process, shape

STEP_TOKENS = 2  # of what a hanging rollout generated before it was aborted


class Weary(IbScore):
    """Finds no node from a certain size on."""

    def branch(self, tree, count, busy):
        return super().branch(tree, count, busy) if tree.trajectories < 6 else []


async def test_no_candidate_ends_the_tree():
    growth = Growth(Process(), shape(4, 9, 1, 1), Weary())
    tree = await growth.grow()
    assert (tree.stop_cause, tree.trajectories) == (StopCause.NO_CANDIDATE, 6)


@pytest.mark.parametrize("budget", [1, 30, 60, 10**6])
async def test_the_token_budget_stops_new_rounds(budget):
    growth = Growth(Process(), shape(4, 9, 1, 1, max_generated_tokens=budget))
    tree = await growth.grow()
    spent = [e.generated_tokens for e in growth.expansions]
    assert tree.ledger.generated_tokens == sum(spent)
    if budget == 10**6:
        assert (tree.stop_cause, tree.trajectories) == (StopCause.COMPLETE, 12)
    else:
        assert tree.stop_cause is StopCause.TOKEN_BUDGET
        assert sum(spent) >= budget
        assert tree.trajectories == 4 or sum(spent[:-1]) < budget
        assert 4 <= tree.trajectories < 12


@pytest.mark.parametrize(("limit", "shape_holds"), [(1, 12), (4, 12), (7, 12), (12, 12), (99, 12)])
@pytest.mark.parametrize("schedule", ["rounds", "eager"])
async def test_the_trajectory_limit_ends_the_tree(limit, shape_holds, schedule):
    growth = Growth(Process(), shape(4, 5, 2, 1, max_trajectories=limit, schedule=schedule))
    tree = await growth.grow()
    assert tree.trajectories == min(limit, shape_holds) == len(growth.process.started)
    whole = limit >= shape_holds
    assert tree.stop_cause is (StopCause.COMPLETE if whole else StopCause.MAX_TRAJECTORIES)
    assert {event.target_trajectories for event in growth.expansions} == {tree.trajectories}


async def test_the_deadline_keeps_what_finished_and_counts_what_did_not():
    growth = Growth(Process(), shape(6, 9, 1, 1, deadline_s=0.1))
    growth.process.hangs = {1, 4}
    began = time.monotonic()
    tree = await growth.grow()
    assert 0.1 <= time.monotonic() - began < 5
    assert (tree.stop_cause, tree.trajectories) == (StopCause.DEADLINE, 4)
    finished = sum(e.generated_tokens for e in growth.expansions)
    assert tree.ledger.generated_tokens == finished + 2 * STEP_TOKENS
    assert growth.process.aborts == 1
    assert not growth.process.cancelled
    assert tree.first_round_reward == pytest.approx(tree.rewards().mean())


async def test_the_deadline_of_a_later_round():
    growth = Growth(Process(), shape(2, 9, 1, 2, deadline_s=0.1))
    growth.process.hangs = {7}
    tree = await growth.grow()
    assert (tree.stop_cause, tree.trajectories) == (StopCause.DEADLINE, 7)
    assert [number for number, _ in growth.process.started][-1] == 7


async def test_a_deadline_with_nothing_finished_raises():
    growth = Growth(Process(), shape(2, 9, 1, 1, deadline_s=0.05))
    growth.process.hangs = {0, 1}
    with pytest.raises(GrowthError, match="no rollout finished \\(deadline\\)"):
        await growth.grow()
    assert not growth.process.in_flight


async def test_a_rollout_that_ignores_the_abort_is_cancelled_after_the_grace(monkeypatch):
    monkeypatch.setattr(grower_module, "_ABORT_GRACE_S", 0.05)
    growth = Growth(Process(), shape(4, 9, 1, 1, deadline_s=0.05))
    growth.process.hangs, growth.process.ignores_abort = {2}, True
    tree = await growth.grow()
    assert (tree.stop_cause, tree.trajectories) == (StopCause.DEADLINE, 3)
    assert growth.process.cancelled == {2}


async def test_a_grade_that_hangs_is_cancelled_after_the_grace(monkeypatch):
    monkeypatch.setattr(grower_module, "_ABORT_GRACE_S", 0.05)
    growth = Growth(Process(), shape(4, 9, 1, 1, deadline_s=0.05))
    grade = growth.process.grade
    hung = growth.process.draw((), 2, 999)[0]
    slow = tuple(t for step in hung for t in step.token_ids)

    async def grade_or_hang(token_ids):
        if token_ids == slow:
            await asyncio.Event().wait()
        return await grade(token_ids)

    growth.process.grade = grade_or_hang
    tree = await growth.grow()
    assert tree.stop_cause is StopCause.DEADLINE
    assert 0 < tree.trajectories < 4
    assert find(tree, 0, hung) is None


@pytest.mark.parametrize("hangs", [{0, 1, 2, 3}, {2}, {7}])
async def test_cancelling_cancels_the_rollouts_in_flight(hangs):
    growth = Growth(Process(), shape(4, 9, 1, 1))
    growth.process.hangs = hangs
    task = asyncio.create_task(growth.grower.grow())
    await until(lambda: growth.process.in_flight == hangs)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert growth.process.cancelled == hangs
    assert not growth.process.in_flight
    growth.tree.validate()


async def test_cancelling_cancels_the_grades_in_flight():
    growth = Growth(Process(), shape(4, 9, 1, 1))
    grading: list[bool] = []

    async def hang(token_ids):
        grading.append(True)
        try:
            await asyncio.Event().wait()
        finally:
            grading.pop()

    growth.process.grade = hang
    task = asyncio.create_task(growth.grower.grow())
    await until(lambda: grading and not growth.process.in_flight)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not grading


async def test_a_failing_rollout_fails_the_tree_and_cancels_the_others():
    growth = Growth(Process(), shape(4, 9, 1, 1))
    growth.process.hangs = {0, 1}
    roll = growth.process.roll

    async def fail_or_roll(tree, start, number):
        if number == 3:
            await until(lambda: growth.process.in_flight == {0, 1})
            raise ZeroDivisionError("lost")
        return await roll(tree, start, number)

    growth.process.roll = fail_or_roll
    with pytest.raises(ZeroDivisionError, match="lost"):
        await growth.grow()
    assert growth.process.cancelled == {0, 1}
    assert not growth.process.in_flight


@pytest.mark.parametrize("reward", [1.5, -0.1, float("nan"), ZeroDivisionError])
async def test_a_bad_grade_fails_the_tree(reward):
    growth = Growth(Process(), shape(4, 9, 1, 1))
    growth.process.hangs = {1}

    async def grade(token_ids):
        if reward is ZeroDivisionError:
            raise ZeroDivisionError
        return reward

    growth.process.grade = grade
    with pytest.raises((ValueError, ZeroDivisionError)):
        await growth.grow()
    assert 1 in growth.process.cancelled
    assert growth.tree.trajectories == 0
    growth.tree.validate()


@pytest.mark.parametrize(
    "lost", [Rollout([], Finish.STOP, 3, 0), Rollout([Process().step(0)], Finish.NONE, 3, 0)]
)
async def test_a_rollout_the_engine_gave_up_fails_the_tree(lost):
    """Nobody asked for it and no limit was reached; what it generated is counted."""
    growth = Growth(Process(), shape(4, 3, 1, 1))
    growth.process.hangs = {0}
    roll = growth.process.roll

    async def roll_or_lose(tree, start, number):
        return lost if number == 1 else await roll(tree, start, number)

    growth.process.roll = roll_or_lose
    with pytest.raises(RolloutLostError, match="gave up a rollout"):
        await growth.grow()
    assert 0 in growth.process.cancelled
    assert growth.tree.ledger.generated_tokens >= lost.generated_tokens
    growth.tree.validate()


@pytest.mark.parametrize(
    ("more", "cause"),
    [
        ({}, StopCause.COMPLETE),
        ({"max_trajectories": 3}, StopCause.MAX_TRAJECTORIES),
        ({"max_generated_tokens": 1}, StopCause.TOKEN_BUDGET),
    ],
)
async def test_a_deadline_after_the_last_rollout_is_not_why_it_ended(more, cause, monkeypatch):
    """The clock passes it while the last rollout is inserted."""
    growth = Growth(Process(), shape(4, 2, 1, 1, deadline_s=60.0, **more))
    whole = {StopCause.COMPLETE: 5, StopCause.MAX_TRAJECTORIES: 3, StopCause.TOKEN_BUDGET: 4}[cause]

    def now() -> float:
        return time.monotonic() + 100.0 * (growth.tree.trajectories == whole)

    monkeypatch.setattr(grower_module, "time", SimpleNamespace(monotonic=now))
    tree = await growth.grow()
    assert tree.trajectories == whole
    assert tree.stop_cause is cause


async def test_a_tree_whose_last_grades_come_after_the_deadline_is_complete():
    growth = Growth(Process(), shape(4, 1, 1, 1, deadline_s=0.05))
    grade = growth.process.grade

    async def slow(token_ids):
        await asyncio.sleep(0.2)
        return await grade(token_ids)

    growth.process.grade = slow
    tree = await growth.grow()
    assert (tree.stop_cause, tree.trajectories) == (StopCause.COMPLETE, 4)


async def test_a_deadline_that_has_passed_already_starts_nothing():
    growth = Growth(Process(), shape(4, 1, 1, 1, deadline_s=60.0))
    growth.grower._until = time.monotonic() - 1.0
    with pytest.raises(GrowthError, match="no rollout finished \\(deadline\\)"):
        await growth.grow()
    assert not growth.process.started


async def test_an_engine_that_did_not_hear_of_the_abort_is_told_again(monkeypatch):
    """It was on its way there: without that the tree ended ten seconds late."""
    monkeypatch.setattr(grower_module, "_ABORT_EVERY_S", 0.02)
    growth = Growth(Process(), shape(4, 9, 1, 1, deadline_s=0.05))
    growth.process.hangs = {2}
    abort = growth.process.abort
    growth.process.abort = lambda tree: abort(tree) if growth.process.aborts else deaf()

    def deaf():
        growth.process.aborts += 1

    began = time.monotonic()
    tree = await growth.grow()
    assert time.monotonic() - began < 2.0
    assert (tree.stop_cause, tree.trajectories) == (StopCause.DEADLINE, 3)
    assert not growth.process.cancelled
