"""Estimates of a prompt's value from 10,000 grown trees against the exact value.

The process is an outcome-graded chain of reasoning: six steps, each right with the same chance in
one of three wordings, and a mistake is never mended; a fifth of the trajectories end right.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Set

import numpy as np

from ibtree.tree import Finish, Floats, Step, Tree
from ibtree.tree.options import TreeOptions
from ibtree.tree.score import values
from server_ext.trees.grower import Grower, Rollout
from server_ext.trees.strategies import IbScore, Strategy

TREES, DEPTH, VALUE = 10_000, 6, 0.2
RIGHT = VALUE ** (1 / DEPTH)
WORDINGS = (0.52 * RIGHT, 0.33 * RIGHT, 0.15 * RIGHT, 0.57 * (1 - RIGHT), 0.43 * (1 - RIGHT))
FIRST_WRONG = 3
STEPS = [Step((word,), (math.log(chance),), (0,)) for word, chance in enumerate(WORDINGS)]
OPTIONS = TreeOptions(init_rollouts=4, rounds=9, branch_nodes=1, branch_rollouts=1)


class Chain:
    """The grower's sampler and judge."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    async def roll(self, tree: Tree, start: int, number: int) -> Rollout:
        left = DEPTH - tree.depth_steps(start)
        return Rollout(self._random.choices(STEPS, WORDINGS, k=left), Finish.STOP, 0, 0)

    async def grade(self, token_ids: tuple[int, ...]) -> float:
        return float(all(word < FIRST_WRONG for word in token_ids))

    def unfinished_tokens(self) -> int:
        return 0

    def rewards(self, token_ids: tuple[int, ...], grade: float) -> dict[tuple[int, ...], float]:
        return {token_ids: grade}

    def abort(self, tree: Tree) -> None:
        raise AssertionError("nothing ends early")


class Planned:
    """Branches at depths fixed in advance along the first rollout: rewards have no say."""

    DEPTHS = (0, 1, 1, 2, 5, 3, 2, 4)

    def first(self, options: TreeOptions) -> int:
        return options.init_rollouts

    def branch(self, tree: Tree, count: int, busy: Set[int]) -> list[int]:
        node = 0
        for _ in range(self.DEPTHS[tree.trajectories - OPTIONS.init_rollouts]):
            node = min(tree.children(node), key=tree.born.__getitem__)
        return [node]


def errors(strategy: Strategy) -> dict[str, Floats]:
    """Estimate minus value at the root, [TREES], by estimator; `first`: the first B0 rollouts."""

    async def grown() -> list[Tree]:
        chain = Chain(seed=0)
        trees = [Tree(prompt=(0,), options=OPTIONS) for _ in range(TREES)]
        return [await Grower(tree, strategy, chain, chain, lambda _: None).grow() for tree in trees]

    trees = asyncio.run(grown())
    assert {tree.trajectories for tree in trees} == {12}
    estimates_of = {name: [values(tree, name)[0] for tree in trees] for name in ("mean", "backup")}
    estimates_of["first"] = [tree.first_round_reward for tree in trees]
    return {name: np.asarray(estimates) - VALUE for name, estimates in estimates_of.items()}


def standard_errors(error: Floats) -> float:
    """Distance of the mean from 0, in its standard errors."""
    return abs(error.mean()) / (error.std() / math.sqrt(TREES))


def test_backup_undoes_most_of_the_bias_of_branching_where_rewards_are_high():
    error = errors(IbScore())
    bias = {name: float(e.mean()) for name, e in error.items()}
    spread = {name: float(np.sqrt((e**2).mean())) for name, e in error.items()}
    assert standard_errors(error["first"]) < 4
    assert bias["mean"] > 0 and standard_errors(error["mean"]) > 4, "there is something to undo"
    assert abs(bias["backup"]) <= 0.5 * bias["mean"]
    assert spread["backup"] < min(spread["mean"], spread["first"])


def test_backup_is_unbiased_where_branches_were_fixed_in_advance():
    error = errors(Planned())
    assert standard_errors(error["backup"]) < 4
