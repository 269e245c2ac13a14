"""A random step process with known values, as the grower's sampler and judge."""

from __future__ import annotations

import asyncio
import math
import random
import zlib
from collections import Counter
from collections.abc import Sequence

from ibtree.messages import Expansion
from ibtree.tree import Finish, Step, Tree
from ibtree.tree.options import TreeOptions
from server_ext.trees.grower import Grower, Rollout
from server_ext.trees.strategies import Strategy, strategy_named

CLOSE = 99


class Process:
    """Steps after any prefix: step k with probability `chances[k]`, `depth` steps in all.

    A step holds its token k + 1 times, then CLOSE, all equally likely. The reward follows from
    the tokens. Rollouts and grades take a few turns of the event loop, so that they end in any
    order. Those whose number is in `hangs` end only when they are aborted or cancelled.
    """

    def __init__(
        self, seed: int = 0, depth: int = 3, chances: Sequence[float] = (0.5, 0.3, 0.2)
    ) -> None:
        self.seed, self.depth, self.chances = seed, depth, chances
        self.hangs: set[int] = set()
        self.ignores_abort = False
        self.in_flight: set[int] = set()
        self.started: list[tuple[int, int]] = []  # (number, start node)
        self.cancelled: set[int] = set()
        self.graded: Counter[tuple[int, ...]] = Counter()
        self.grades_in_flight = 0
        self.aborts = 0
        self._aborted = asyncio.Event()

    def reward(self, tokens: tuple[int, ...]) -> float:
        return float(zlib.crc32(bytes((self.seed, *tokens))) % 3 == 0)

    def step(self, k: int) -> Step:
        ids = (k,) * (k + 1) + (CLOSE,)
        return Step(ids, (math.log(self.chances[k]) / len(ids),) * len(ids), (0,) * len(ids))

    def value(self, tokens: tuple[int, ...] = ()) -> float:
        """The exact chance of reward 1 from here."""
        if tokens.count(CLOSE) == self.depth:
            return self.reward(tokens)
        return math.fsum(
            chance * self.value(tokens + self.step(k).token_ids)
            for k, chance in enumerate(self.chances)
        )

    def draw(self, tokens: tuple[int, ...], number: int, limit: int) -> tuple[list[Step], Finish]:
        rng = random.Random(self.seed * 10007 + number)
        kinds = rng.choices(range(len(self.chances)), self.chances, k=self.depth)
        steps = [self.step(k) for k in kinds[tokens.count(CLOSE) :]]
        within, left = [], limit
        for step in steps:
            if len(step.token_ids) > left:
                return ([*within, step.cut(left)[0]] if left else within), Finish.LENGTH
            within.append(step)
            left -= len(step.token_ids)
        return within, Finish.STOP

    async def roll(self, tree: Tree, start: int, number: int) -> Rollout:
        prefix = tree.prefix(start)
        limit = tree.options.sampling.max_new_tokens - len(prefix)
        assert limit >= 1
        self.started.append((number, start))
        self.in_flight.add(number)
        try:
            await self._pause(number)
            if number in self.hangs:
                await (asyncio.Event() if self.ignores_abort else self._aborted).wait()
                return Rollout([self.step(0)], Finish.NONE, len(prefix), 1)
        except asyncio.CancelledError:
            self.cancelled.add(number)
            raise
        finally:
            self.in_flight.discard(number)
        steps, finish = self.draw(prefix, number, limit)
        return Rollout(steps, finish, len(tree.prompt) + len(prefix), len(prefix))

    async def grade(self, token_ids: tuple[int, ...]) -> float:
        self.graded[token_ids] += 1
        self.grades_in_flight += 1
        try:
            await self._pause(zlib.crc32(bytes(token_ids)))
        finally:
            self.grades_in_flight -= 1
        return self.reward(token_ids)

    def rewards(self, token_ids: tuple[int, ...], grade: float) -> dict[tuple[int, ...], float]:
        return {token_ids: grade}

    async def _pause(self, number: int) -> None:
        for _ in range(random.Random(number).randrange(20)):
            await asyncio.sleep(0)

    def unfinished_tokens(self) -> int:
        return 0

    def abort(self, tree: Tree) -> None:
        self.aborts += 1
        self._aborted.set()


class Growth:
    """A grower over a process; keeps the expansions."""

    def __init__(
        self, process: Process, options: TreeOptions, strategy: Strategy | None = None
    ) -> None:
        self.process, self.tree = process, Tree(prompt=(7, 8, 9), options=options)
        self.expansions: list[Expansion] = []
        chosen = strategy or strategy_named(options.strategy)
        self.grower = Grower(self.tree, chosen, process, process, self._emit)

    def _emit(self, expansion: Expansion) -> None:
        assert expansion.trajectories == self.tree.trajectories
        self.tree.validate()
        self.expansions.append(expansion)

    async def grow(self) -> Tree:
        tree = await asyncio.wait_for(self.grower.grow(), 30)
        assert tree is self.tree
        assert not self.process.in_flight
        assert not self.process.grades_in_flight
        tree.validate()
        return tree


def shape(
    init_rollouts: int, rounds: int, nodes: int, rollouts: int, **more: object
) -> TreeOptions:
    return TreeOptions(
        init_rollouts=init_rollouts,
        rounds=rounds,
        branch_nodes=nodes,
        branch_rollouts=rollouts,
        **more,
    )
