"""The grower: B0 rollouts from the prompt, then rounds of branches where the strategy says.

arXiv 2605.28109, algorithm 1 (IBTree), schedule `rounds`: a whole round ends before the next
nodes are chosen.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ibtree.messages import Expansion
from ibtree.tree import Finish, Step, StopCause, Tree
from server_ext.grow.strategies import Strategy

_ABORT_GRACE_S = 10.0


class GrowthError(RuntimeError):
    """The tree cannot be grown; as it is: no rollout finished before it had to end."""


class RolloutLostError(GrowthError):
    """The engine ended a rollout that nobody aborted."""


@dataclass(frozen=True)
class Rollout:
    """What one request generated below its start node; `finish` is NONE if it was aborted."""

    steps: Sequence[Step]
    finish: Finish
    prefix_tokens: int
    cached_tokens: int

    @property
    def generated_tokens(self) -> int:
        return sum(len(step.token_ids) for step in self.steps)


class Sampler(Protocol):
    """Where rollouts and their rewards come from."""

    async def roll(self, tree: Tree, start: int, number: int) -> Rollout:
        """Rollout `number` of the tree, from the end of node `start` to its own end."""

    async def grade(self, tree: Tree, token_ids: tuple[int, ...]) -> float:
        """Reward in [0, 1] of a finished trajectory, given all its generated ids."""

    def abort(self, tree: Tree) -> None:
        """Ends the tree's rollouts in flight early; `roll` returns them with finish NONE."""


class Grower:
    """Grows one tree; `emit` is called once per finished rollout, in order of insertion."""

    def __init__(
        self, tree: Tree, strategy: Strategy, sampler: Sampler, emit: Callable[[Expansion], None]
    ) -> None:
        self._tree, self._strategy, self._sampler, self._emit = tree, strategy, sampler, emit
        self._started = 0
        self._aborting = False
        self._grades: dict[tuple[int, ...], asyncio.Task[float]] = {}

    async def grow(self) -> Tree:
        """Returns the tree with its stop cause and ledger. Raises GrowthError if no rollout
        finished, RolloutLostError or what the sampler raises if one was lost; cancelling it
        cancels the rollouts in flight."""
        tree, options = self._tree, self._tree.options
        began = time.monotonic()
        until = None if options.deadline_s is None else began + options.deadline_s
        starts = [0] * self._strategy.first(options)
        round_number = 1
        while tree.stop_cause is StopCause.GROWING:
            await self._round(round_number, starts, until)
            if round_number == 1 and tree.trajectories:
                tree.first_round_reward = tree.reward_sums[0] / tree.trajectories
            round_number += 1
            left = options.trajectories - self._started
            nodes = self._strategy.branch(tree, options.branch_nodes) if left else []
            starts = [node for node in nodes for _ in range(options.branch_rollouts)][:left]
            tree.stop_cause = self._stop(until, left, starts)
        tree.ledger.wall_s = time.monotonic() - began
        if not tree.trajectories:
            raise GrowthError(f"no rollout finished ({tree.stop_cause.name.lower()})")
        return tree

    def _stop(self, until: float | None, left: int, starts: list[int]) -> StopCause:
        limit = self._tree.options.max_generated_tokens
        if until is not None and time.monotonic() >= until:
            return StopCause.DEADLINE
        if not left:
            return StopCause.COMPLETE
        if limit is not None and self._tree.ledger.generated_tokens >= limit:
            return StopCause.TOKEN_BUDGET
        return StopCause.GROWING if starts else StopCause.NO_CANDIDATE

    async def _round(self, number: int, starts: list[int], until: float | None) -> None:
        async def one(start: int, index: int) -> None:
            rollout = await self._sampler.roll(self._tree, start, index)
            await self._insert(number, start, rollout)

        first = self._started
        self._started += len(starts)
        tasks = [asyncio.create_task(one(s, first + i)) for i, s in enumerate(starts)]
        try:
            timeout_s = None if until is None else max(until - time.monotonic(), 0.0)
            done, late = await asyncio.wait(
                tasks, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION
            )
            for task in done:
                task.result()  # a lost rollout fails the tree
            if late:
                self._aborting = True
                self._sampler.abort(self._tree)
                await asyncio.wait(late, timeout=_ABORT_GRACE_S)
        finally:
            everything: list[asyncio.Task[Any]] = [*tasks, *self._grades.values()]
            for one_task in everything:
                one_task.cancel()
            await asyncio.gather(*everything, return_exceptions=True)

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
        reward = await self._reward(tree.prefix(start) + below)
        end = tree.insert(tree.alive(start), rollout.steps, reward, rollout.finish)
        self._emit(
            Expansion(
                round=number,
                start_node=start,
                end_node=end,
                generated_tokens=rollout.generated_tokens,
                reward=reward,
                finish=rollout.finish,
                trajectories=tree.trajectories,
                target_trajectories=tree.options.trajectories,
            )
        )

    async def _reward(self, token_ids: tuple[int, ...]) -> float:
        """Grades each distinct trajectory once, however many rollouts end with it."""
        if token_ids not in self._grades:
            grade = self._sampler.grade(self._tree, token_ids)
            self._grades[token_ids] = asyncio.ensure_future(grade)
        return await asyncio.shield(self._grades[token_ids])
