"""The grower: B0 rollouts from the prompt, then branches where the strategy says.

arXiv 2605.28109, algorithm 1 (IBTree). Schedules:

rounds  a whole round ends before the next nodes are chosen (the paper)
eager   as many rollouts as began stay in flight; each that ends starts the next one (ours)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ibtree.messages import Expansion
from ibtree.tree import Finish, Step, StopCause, Tree
from server_ext.errors import GrowthError, RolloutLostError
from server_ext.trees.strategies import Strategy

_ABORT_GRACE_S = 10.0
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


class Sampler(Protocol):
    """The source of rollouts and of their rewards."""

    async def roll(self, tree: Tree, start: int, number: int) -> Rollout:
        """Rollout `number` of the tree, from the end of node `start` to its own end."""

    async def grade(self, tree: Tree, token_ids: tuple[int, ...]) -> float:
        """Reward in [0, 1] of a finished trajectory, given all its generated ids."""

    def regraded(self, tree: Tree, end: int, token_ids: tuple[int, ...]) -> dict[int, float]:
        """Rewards by end node that change now that the trajectory is in the tree and ends with
        node `end`: for graders that compare trajectories."""

    def abort(self, tree: Tree) -> None:
        """Ends the tree's rollouts in flight early; `roll` returns them with finish NONE."""


class Grower:
    """Grows one tree; `emit` is called once per finished rollout, in order of insertion."""

    def __init__(
        self, tree: Tree, strategy: Strategy, sampler: Sampler, emit: Callable[[Expansion], None]
    ) -> None:
        self._tree, self._strategy, self._sampler, self._emit = tree, strategy, sampler, emit
        self._first = strategy.first(tree.options)
        self._started = 0
        self._in_flight: dict[asyncio.Task[None], int] = {}
        """Start nodes of the rollouts, by their tasks."""
        self._first_ends: list[int] = []
        """End nodes of the first round's rollouts."""
        self._aborting = False
        self._grades: dict[tuple[int, ...], asyncio.Task[float]] = {}

    async def grow(self) -> Tree:
        """Returns the tree with its stop cause and ledger. Raises GrowthError if no rollout
        finished, RolloutLostError or what the sampler raises if one was lost; cancelling it
        cancels the rollouts in flight."""
        tree, deadline_s = self._tree, self._tree.options.deadline_s
        began = time.monotonic()
        until = None if deadline_s is None else began + deadline_s
        try:
            while (cause := self._cause(until)) is StopCause.GROWING or self._in_flight:
                if cause is StopCause.GROWING:
                    for start in self._starts():
                        self._launch(start)
                if not self._in_flight:
                    cause = StopCause.NO_CANDIDATE
                    break
                await self._wait(until)
        finally:
            await _end([*self._in_flight, *self._grades.values()])
        tree.stop_cause = cause
        tree.ledger.wall_s = time.monotonic() - began
        if not tree.trajectories:
            raise GrowthError(f"no rollout finished ({cause.name.lower()})")
        if self._first_ends:
            rewards = [tree.reward(tree.alive(end)) for end in self._first_ends]
            tree.first_round_reward = sum(rewards) / len(rewards)
        return tree

    def _cause(self, until: float | None) -> StopCause:
        """Why no more rollouts start; GROWING: they do."""
        options = self._tree.options
        limit = options.max_generated_tokens
        if until is not None and time.monotonic() >= until:
            return StopCause.DEADLINE
        if self._started >= options.shape_trajectories:
            return StopCause.COMPLETE
        if self._started >= options.trajectories:
            return StopCause.MAX_TRAJECTORIES
        if limit is not None and self._tree.ledger.generated_tokens >= limit:
            return StopCause.TOKEN_BUDGET
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

    async def _wait(self, until: float | None) -> None:
        """Waits until a rollout ended, or for the deadline: then all are aborted."""
        timeout_s = None if until is None else max(until - time.monotonic(), 0.0)
        done, _ = await asyncio.wait(
            self._in_flight, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if not done:
            self._aborting = True
            self._sampler.abort(self._tree)
            await asyncio.wait(self._in_flight, timeout=_ABORT_GRACE_S)
            await _end([*self._in_flight])
            self._in_flight.clear()
            return
        for task in done:
            del self._in_flight[task]
        lost = [error for task in done if (error := task.exception())]  # each is looked at
        if lost:  # fails the tree
            raise lost[0]

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
        token_ids = tree.prefix(tree.alive(start)) + below
        reward = await self._reward(token_ids)
        start = tree.alive(start)
        end = tree.insert(start, rollout.steps, reward, rollout.finish)
        rewards = self._sampler.regraded(tree, end, token_ids)
        for node, anew in rewards.items():
            tree.set_reward(node, anew)
        if number < self._first:
            self._first_ends.append(end)
        self._emit(
            Expansion(
                round=self._round(number),
                start_node=start,
                end_node=end,
                generated_tokens=rollout.generated_tokens,
                reward=rewards.get(end, reward),
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

    async def _reward(self, token_ids: tuple[int, ...]) -> float:
        """Grades each distinct trajectory once, however many rollouts end with it."""
        if token_ids not in self._grades:
            grade = self._sampler.grade(self._tree, token_ids)
            self._grades[token_ids] = asyncio.ensure_future(grade)
        return await asyncio.shield(self._grades[token_ids])


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancels what still runs, and waits for it."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
