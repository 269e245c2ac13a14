"""Strategies: where each branches, and what the schedules keep in flight."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter

import numpy as np
import pytest

from ibtree.errors import FieldError
from ibtree.tree import Finish, Tree
from ibtree.tree.score import (
    budget_scores,
    candidates,
    ib_scores,
    rest_tokens,
    unlikeliest_token,
)
from server_ext.trees import strategies as module
from server_ext.trees.strategies import BUILT_IN, Entropy, IbScore, strategy_named
from tests.server_ext.trees.process import CLOSE, Growth, Process, shape


def grown_at_random(seed: int) -> Tree:
    """A tree of twelve rollouts, eight of them branches."""
    return asyncio.run(Growth(Process(seed, depth=4), shape(4, 9, 1, 1, strategy="random")).grow())


@pytest.mark.parametrize("seed", range(20))
def test_rest_tokens_and_budget_scores(seed):
    """Against sums written out."""
    tree = grown_at_random(seed)
    rest, scores, ib = rest_tokens(tree), budget_scores(tree), ib_scores(tree)
    mean_step = tree.unique_tokens / (len(tree) - 1)
    expected = {}
    for node in range(len(tree)):
        below = [e for e in tree.end_nodes() if node == 0 or node in tree.path(e)]
        lengths = [tree.depth_tokens(e) - tree.depth_tokens(node) for e in below]
        weights = [tree.ends[e] for e in below]
        assert rest[node] == pytest.approx(np.average(lengths, weights=weights))
        if not tree.is_leaf(node):
            expected[node] = math.exp(ib[node]) / (np.average(lengths, weights=weights) + mean_step)
    assert all(math.isnan(scores[n]) for n in range(len(tree)) if n not in expected)
    ratios = [scores[n] / expected[n] for n in expected]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))


@pytest.mark.parametrize("strategy", ["random", "ib", "ib_budget", "fixed_width"])
async def test_branches_start_where_they_may(strategy):
    growth = Growth(Process(seed=3), shape(4, 9, 1, 1, strategy=strategy))
    roll = growth.process.roll

    async def watched(tree: Tree, start: int, number: int):
        assert start in candidates(tree) or number < 4
        return await roll(tree, start, number)

    growth.process.roll = watched
    await growth.grow()


async def test_random_reaches_every_candidate():
    starts: Counter[int] = Counter()
    for _ in range(60):
        growth = Growth(Process(seed=3), shape(4, 2, 1, 1, strategy="random"))
        await growth.grow()
        starts[growth.process.started[-1][1]] += 1
    growth = Growth(Process(seed=3), shape(4, 1, 1, 1))
    assert set(starts) == set(candidates(await growth.grow()))


async def test_fixed_width_branches_at_equal_depths_of_each_trunk():
    """Four trunks of nine steps, eight branches: at a third and two thirds of each."""
    growth = Growth(Process(seed=2, depth=9), shape(4, 9, 1, 1, strategy="fixed_width"))
    tree = await growth.grow()
    branches = [start for number, start in growth.process.started if number >= 4]
    assert Counter(tree.depth_steps(n) for n in branches) == {3: 4, 6: 4}
    trunks = sorted(tree.end_nodes(), key=lambda n: tree.born[n])[:4]
    assert all(any(n in tree.path(trunk) for trunk in trunks) for n in branches)


async def test_entropy_forks_before_the_least_likely_tokens():
    growth = Growth(Process(seed=1), shape(4, 9, 1, 1, strategy="entropy"))
    seen: list[tuple[float, float]] = []
    roll = growth.process.roll

    async def watched(tree: Tree, start: int, number: int):
        if number >= 4:
            after = min(tree.steps[c].logprobs[0] for c in tree.children(start))
            inside = [lp for step in tree.steps[1:] for lp in step.logprobs[1:]]
            seen.append((after, min(inside, default=0.0)))
        return await roll(tree, start, number)

    growth.process.roll = watched
    tree = await growth.grow()
    tree.validate()
    assert len(seen) == 8 and all(fork <= rest + 1e-9 for fork, rest in seen)
    split = [n for n in range(1, len(tree)) if CLOSE not in tree.steps[n].token_ids]
    assert split, "no step was split at a token"


@pytest.mark.parametrize("seed", range(20))
def test_a_fork_is_the_unused_token_of_lowest_probability(seed):
    """Against a look at every token, through splits and branches."""
    tree, strategy, rng = grown_at_random(seed), Entropy(), random.Random(seed)
    for _ in range(12):
        busy = set(rng.sample(range(len(tree)), rng.randrange(3)))
        tokens = [
            (logprob, tree.born[node], at, node)
            for node in range(1, len(tree))
            for at, logprob in enumerate(tree.steps[node].logprobs)
            if at or not (tree.starts[tree.parents[node]] or tree.parents[node] in busy)
        ]
        expected = min(tokens)[:1:-1] if tokens else None
        assert unlikeliest_token(tree, busy) == expected
        [start] = strategy.branch(tree, 1, busy)
        below = tree.steps[rng.choice(tree.children(start))]
        tree.insert(start, [below], tree.reward(tree.end_nodes()[0]), Finish.STOP)


@pytest.mark.parametrize("strategy", [name for name in BUILT_IN if name != "independent"])
async def test_eager_keeps_as_many_in_flight_as_began(strategy):
    growth = Growth(Process(seed=4), shape(4, 9, 1, 1, strategy=strategy, schedule="eager"))
    in_flight: list[int] = []
    roll = growth.process.roll

    async def watched(tree: Tree, start: int, number: int):
        in_flight.append(len(growth.grower._in_flight))
        return await roll(tree, start, number)

    growth.process.roll = watched
    await growth.grow()
    # where several end at once, fewer may be left to start: only near the end of the tree
    assert max(in_flight) == 4 and in_flight[:9] == [4] * 9


async def test_a_straggler_does_not_block_an_eager_tree():
    growth = Growth(Process(), shape(4, 9, 1, 1, schedule="eager", deadline_s=0.5))
    growth.process.hangs = {1}
    tree = await growth.grow()
    assert tree.trajectories == 11  # all but the straggler, which the deadline ended


def test_a_busy_node_is_taken_only_when_no_other_is_free():
    tree = grown_at_random(7)
    among, strategy = candidates(tree), IbScore()
    [free] = strategy.branch(tree, 1, frozenset())
    [second] = strategy.branch(tree, 1, {free})
    assert second != free or len(among) == 1
    assert strategy.branch(tree, 1, set(among)) == [free]


def test_user_strategies_come_through_an_entry_point(monkeypatch):
    class Mine(IbScore):
        pass

    class Point:
        def __init__(self, name):
            self.name = name

        def load(self):
            return Mine

    points = [Point("mine"), Point("ib")]
    monkeypatch.setattr(module, "entry_points", lambda group: points)
    module.strategies.cache_clear()
    try:
        assert isinstance(strategy_named("mine"), Mine)
        assert strategy_named("ib") is BUILT_IN["ib"]
        with pytest.raises(FieldError, match="mine"):
            strategy_named("other")
    finally:
        module.strategies.cache_clear()
