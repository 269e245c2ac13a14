"""The grower: B0 rollouts from the prompt, then branches where the strategy says.

arXiv 2605.28109, algorithm 1 (IBTree). Schedules:

rounds  a whole round ends before the next nodes are chosen (the paper)
eager   as many rollouts as began stay in flight; each that ends starts the next one (ours)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ibtree.messages import Expansion
from ibtree.tree import Finish, Step, StopCause, Tree
from server_ext.errors import GrowthError, RolloutLostError
from server_ext.trees.strategies import Strategy

_ABORT_GRACE_S = 10.0
"""How long rollouts that were aborted may take to end, and those that had ended to be graded."""
_ABORT_EVERY_S = 0.5
"""An engine does not hear of a rollout that is only on its way to it: it is told again."""
_ROUNDING = 1e-12
SCHEDULES = ("rounds", "eager")


@dataclass(frozen=True)
class Rollout:
    """What one request generated below its start node; `finish` is NONE if it was aborted.
    `dropped_tokens` were generated after its end."""

    steps: Sequence[Step]
    finish: Finish
    prefix_tokens: int
    cached_tokens: int
    dropped_tokens: int = 0

    @property
    def generated_tokens(self) -> int:
        return sum(len(step.token_ids) for step in self.steps) + self.dropped_tokens


Trajectory = tuple[int, ...]
"""All ids generated from the prompt's end on."""
Grade = float | str
"""What a trajectory is worth: a reward in [0, 1], or what it says where they are compared."""


class Sampler(Protocol):
    """The source of rollouts."""

    async def roll(self, tree: Tree, start: int, number: int) -> Rollout:
        """Rollout `number` of the tree, from the end of node `start` to its own end."""

    def unfinished_tokens(self) -> int:
        """What rollouts in flight have generated so far [tokens]."""

    def abort(self, tree: Tree) -> None:
        """Ends the tree's rollouts in flight early; `roll` returns them with finish NONE. May be
        called again while some are still in flight."""


class Judge(Protocol):
    """The source of rewards."""

    async def grade(self, trajectory: Trajectory) -> Grade:
        """The grade of a finished trajectory; asked for once, however many rollouts end so."""

    def rewards(self, trajectory: Trajectory, grade: Grade) -> Mapping[Trajectory, float]:
        """Rewards in [0, 1] that hold when one more rollout has ended with this trajectory: its
        own, and those of others in the tree that change with it."""


class Grower:
    """Grows one tree; `emit` is called once per finished rollout, in order of insertion."""

    def __init__(
        self,
        tree: Tree,
        strategy: Strategy,
        sampler: Sampler,
        judge: Judge,
        emit: Callable[[Expansion], None],
        until: float | None = None,
    ) -> None:
        """`until`: when the tree's deadline is, on the monotonic clock; None: its `deadline_s`, if
        it has one, runs from `grow` on."""
        self._until = until
        self._tree, self._strategy, self._emit = tree, strategy, emit
        self._sampler, self._judge = sampler, judge
        self._first = strategy.first(tree.options)
        self._started = 0
        self._in_flight: dict[asyncio.Task[None], int] = {}
        """Start nodes of the rollouts, by their tasks."""
        self._first_ends: list[int] = []
        """End nodes of the first round's rollouts."""
        self._aborting = False
        self._grades: dict[Trajectory, asyncio.Task[Grade]] = {}
        self._ends: dict[Trajectory, set[int]] = {}
        """Nodes that each trajectory ends with; a split may have merged them since."""

    async def grow(self) -> Tree:
        """Returns the tree with its stop cause and ledger. Raises GrowthError if no rollout
        finished, RolloutLostError or what the sampler raises if one was lost; cancelling it
        cancels the rollouts in flight."""
        tree, deadline_s = self._tree, self._tree.options.deadline_s
        began, until = time.monotonic(), self._until
        if until is None and deadline_s is not None:
            until = began + deadline_s
        cause = StopCause.GROWING
        try:
            while cause is StopCause.GROWING or self._in_flight:
                if cause is StopCause.GROWING:
                    cause = self._cause(until)
                if cause is StopCause.GROWING:
                    for start in self._starts():
                        self._launch(start)
                    if not self._in_flight:
                        cause = StopCause.NO_CANDIDATE
                if self._in_flight and not await self._wait(until):
                    cause = StopCause.DEADLINE
        finally:
            await self._cancel()
        tree.stop_cause = cause
        tree.ledger.wall_s = time.monotonic() - began
        if not tree.trajectories:
            raise GrowthError(f"no rollout finished ({cause.name.lower()})")
        if self._first_ends:
            rewards = [tree.reward(tree.alive(end)) for end in self._first_ends]
            tree.first_round_reward = sum(rewards) / len(rewards)
        return tree

    def _cause(self, until: float | None) -> StopCause:
        """Why no more rollouts start; GROWING: they do. A tree that has all it was to have is not
        late, whatever the time."""
        options = self._tree.options
        limit = options.max_generated_tokens
        if self._started >= options.shape_trajectories:
            return StopCause.COMPLETE
        if self._started >= options.trajectories:
            return StopCause.MAX_TRAJECTORIES
        if limit is not None and self._tree.ledger.generated_tokens >= limit:
            return StopCause.TOKEN_BUDGET
        if until is not None and time.monotonic() >= until:
            return StopCause.DEADLINE
        return StopCause.GROWING

    def _starts(self) -> list[int]:
        """Nodes from whose ends rollouts start now."""
        tree, options = self._tree, self._tree.options
        left = options.trajectories - self._started
        if not self._started:
            return [0] * min(self._first, left)
        if options.schedule == "rounds":
            if self._in_flight:
                return []
            nodes = self._strategy.branch(tree, options.branch_nodes, frozenset())
            return [node for node in nodes for _ in range(options.branch_rollouts)][:left]
        starts: list[int] = []
        for _ in range(min(self._first - len(self._in_flight), left)):
            busy = {tree.alive(node) for node in (*self._in_flight.values(), *starts)}
            starts += self._strategy.branch(tree, 1, frozenset(busy))
        return starts

    def _launch(self, start: int) -> None:
        async def roll(number: int) -> None:
            rollout = await self._sampler.roll(self._tree, start, number)
            await self._insert(number, start, rollout)

        self._in_flight[asyncio.create_task(roll(self._started))] = start
        self._started += 1

    async def _wait(self, until: float | None) -> bool:
        """Waits until a rollout ended, or for the deadline: then all are aborted. Whether all that
        began are in the tree, or may still come."""
        timeout_s = None if until is None else max(until - time.monotonic(), 0.0)
        done, _ = await asyncio.wait(
            self._in_flight, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if not done:
            await self._give_up()
            return self._tree.trajectories == self._started
        for task in done:
            del self._in_flight[task]
        lost = [error for task in done if (error := task.exception())]  # each is looked at
        if lost:  # fails the tree
            raise lost[0]
        return True

    async def _give_up(self) -> None:
        """Ends the rollouts in flight: aborted ones are dropped, those that had ended are graded
        and kept if that does not take long."""
        self._aborting = True
        end = time.monotonic() + _ABORT_GRACE_S
        pending = {*self._in_flight}
        while pending and (left_s := end - time.monotonic()) > 0:
            self._sampler.abort(self._tree)
            _, pending = await asyncio.wait(pending, timeout=min(_ABORT_EVERY_S, left_s))
        await self._cancel()

    async def _cancel(self) -> None:
        """Ends what still runs. What rollouts generated is counted, though nobody gets it."""
        self._tree.ledger.generated_tokens += self._sampler.unfinished_tokens()
        await _end([*self._in_flight, *self._grades.values()])
        self._in_flight.clear()

    async def _insert(self, number: int, start: int, rollout: Rollout) -> None:
        tree, ledger = self._tree, self._tree.ledger
        ledger.generated_tokens += rollout.generated_tokens
        ledger.prefix_tokens += rollout.prefix_tokens
        ledger.cached_tokens += rollout.cached_tokens
        if rollout.finish is Finish.NONE or not rollout.steps:
            if not self._aborting:
                raise RolloutLostError(f"the engine gave up a rollout of tree {tree.tree_id!r}")
            return
        below = tuple(t for step in rollout.steps for t in step.token_ids)
        trajectory = tree.prefix(tree.alive(start)) + below
        grade = await self._grade(trajectory)
        rewards, start = self._judge.rewards(trajectory, grade), tree.alive(start)
        end = tree.insert(start, rollout.steps, rewards[trajectory], rollout.finish)
        self._ends.setdefault(trajectory, set()).add(end)
        self._reward(rewards)
        if number < self._first:
            self._first_ends.append(end)
        self._emit(
            Expansion(
                round=self._round(number),
                start_node=start,
                end_node=end,
                generated_tokens=rollout.generated_tokens,
                reward=rewards[trajectory],
                finish=rollout.finish,
                trajectories=tree.trajectories,
                target_trajectories=tree.options.trajectories,
            )
        )

    def _round(self, number: int) -> int:
        """The round, from 1, in which the paper's schedule would start this rollout."""
        options = self._tree.options
        a_round = options.branch_nodes * options.branch_rollouts
        return 1 if number < self._first else 2 + (number - self._first) // a_round

    async def _grade(self, trajectory: Trajectory) -> Grade:
        """Grades each distinct trajectory once, however many rollouts end with it."""
        if trajectory not in self._grades:
            self._grades[trajectory] = asyncio.ensure_future(self._judge.grade(trajectory))
        return await asyncio.shield(self._grades[trajectory])

    def _reward(self, rewards: Mapping[Trajectory, float]) -> None:
        """Gives the trajectories that are in the tree these rewards, where they differ by more
        than rounding."""
        tree = self._tree
        for trajectory, reward in rewards.items():
            for node in {tree.alive(node) for node in self._ends[trajectory]}:
                if abs(tree.reward(node) - reward) > _ROUNDING:
                    tree.set_reward(node, reward)


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancels what still runs, and waits for it."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
