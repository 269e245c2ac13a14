"""Growing trees over a process with known values: counts, rounds, where branches start."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from ibtree.tree import Finish, Step, StopCause
from ibtree.tree.options import SamplingOptions
from ibtree.tree.score import values
from server_ext.trees.grower import SCHEDULES
from server_ext.trees.strategies import BUILT_IN
from tests.ibtree.tree.growing import find, path_of
from tests.reference.slow_tree import SlowStep, SlowTree
from tests.server_ext.trees.process import CLOSE, Growth, Process, shape

SHAPES = [(4, 9, 1, 1), (1, 1, 1, 1), (5, 1, 3, 3), (2, 3, 2, 2), (3, 4, 3, 1), (1, 5, 1, 3)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("strategy", BUILT_IN)
@pytest.mark.parametrize("numbers", SHAPES)
async def test_the_full_shape(numbers, strategy, schedule):
    b0, rounds, k, b = numbers
    growth = Growth(Process(), shape(*numbers, strategy=strategy, schedule=schedule))
    tree = await growth.grow()
    total = b0 + (rounds - 1) * k * b
    assert tree.stop_cause is StopCause.COMPLETE
    assert tree.trajectories == len(growth.expansions) == total
    assert sorted(number for number, _ in growth.process.started) == list(range(total))
    assert [e.trajectories for e in growth.expansions] == list(range(1, total + 1))
    assert {e.target_trajectories for e in growth.expansions} == {total}
    first = total if strategy == "independent" else b0
    sizes = Counter(e.round for e in growth.expansions)
    assert sizes == {1: first} | {r: k * b for r in range(2, rounds + 1) if first < total}
    tree.validate()


async def test_the_expansions_tell_the_tree():
    growth = Growth(Process(seed=11), shape(4, 9, 1, 1))
    tree = await growth.grow()
    assert Counter(e.end_node for e in growth.expansions) == {
        n: tree.ends[n] for n in tree.end_nodes()
    }
    assert Counter(e.start_node for e in growth.expansions) == {
        n: starts for n, starts in enumerate(tree.starts) if starts
    }
    for e in growth.expansions:
        below = tree.depth_tokens(e.end_node) - tree.depth_tokens(e.start_node)
        assert e.generated_tokens == below
        assert e.reward == tree.reward(e.end_node) == growth.process.reward(tree.prefix(e.end_node))
        assert e.finish == tree.finishes[e.end_node]
    ledger = tree.ledger
    assert ledger.generated_tokens == sum(e.generated_tokens for e in growth.expansions)
    starts = [tree.depth_tokens(e.start_node) for e in growth.expansions]
    assert ledger.cached_tokens == sum(starts)
    assert ledger.prefix_tokens == sum(starts) + 12 * len(tree.prompt)
    assert ledger.wall_s > 0
    first = [e.reward for e in growth.expansions if e.round == 1]
    assert len(first) == 4
    assert tree.first_round_reward == sum(first) / 4 != tree.rewards().mean()


async def test_expansions_come_in_order_of_insertion():
    growth = Growth(Process(seed=1, depth=4), shape(12, 1, 1, 1))
    known = [1]
    ends: list[int] = []

    def emit(expansion):
        """A node that is new at this expansion has the ids that come next."""
        new = len(growth.tree) - known[0]
        assert expansion.end_node == len(growth.tree) - 1 if new else True
        known[0] = len(growth.tree)
        ends.append(expansion.end_node)

    growth.grower._emit = emit
    await growth.grow()
    assert len(ends) == 12
    numbers = [number for number, _ in growth.process.started]
    drawn = [growth.process.draw((), n, 999)[0] for n in numbers]
    leaves = [find(growth.tree, 0, steps) for steps in drawn]
    assert sorted(leaves) == sorted(ends)
    assert leaves != ends  # they ended in another order than they were started


@pytest.mark.parametrize("numbers", SHAPES)
async def test_a_round_starts_when_the_whole_round_before_has_ended(numbers):
    growth = Growth(Process(), shape(*numbers))
    roll, rounds = growth.process.roll, list[list[int]]()

    async def watched(tree, start, number):
        if tree.trajectories == number:  # all before are in the tree: a round may begin
            assert not growth.process.in_flight
            rounds.append([])
        assert tree.trajectories == (rounds[-1] or [number])[0]
        rounds[-1].append(number)
        return await roll(tree, start, number)

    growth.process.roll = watched
    tree = await growth.grow()
    assert [n for numbers_of_round in rounds for n in numbers_of_round] == list(
        range(tree.trajectories)
    )
    sizes = Counter(e.round for e in growth.expansions)
    assert [len(numbers_of_round) for numbers_of_round in rounds] == [
        sizes[r + 1] for r in range(len(rounds))
    ]
    assert [e.round for e in growth.expansions] == sorted(e.round for e in growth.expansions)
    assert len(rounds[0]) == numbers[0]


class Witness:
    """Mirrors a growing tree in the slow reference and judges where branches start."""

    def __init__(self, growth: Growth) -> None:
        self.growth, self.slow = growth, SlowTree()
        self.born: dict[tuple, int] = {(): 0}
        growth.grower._emit = self.note
        self.roll, growth.process.roll = growth.process.roll, self.judged
        self.judged_branches = 0

    def note(self, e) -> None:
        tree, process = self.growth.tree, self.growth.process
        start, end = path_of(tree, e.start_node), path_of(tree, e.end_node)
        steps = [process.step(ids[0]) for ids in end[len(start) :]]
        drawn = [SlowStep(s.token_ids, s.logprobs, s.versions) for s in steps]
        self.slow.insert(start, drawn, e.reward, int(e.finish))
        for i in range(len(end) + 1):
            self.born.setdefault(end[:i], len(self.born))

    async def judged(self, tree, start, number):
        o = tree.options
        if number >= o.init_rollouts:
            self.judged_branches += 1
            form = (o.value_estimator, o.confidence, o.beta, o.zero_value_ratio)
            inner = [n for n in self.slow.nodes() if self.slow.children(n)]
            scores = {n: self.slow.ib_score(n, *form) for n in inner}
            rank = (number - o.init_rollouts) // o.branch_rollouts % o.branch_nodes
            ranked = sorted(scores.values(), reverse=True)
            # which of nearly equal nodes comes first may hang on the last bit
            assert math.isclose(scores[path_of(tree, start)], ranked[rank], abs_tol=1e-9)
        return await self.roll(tree, start, number)


@pytest.mark.parametrize("confidence", ["geometric", "product", "sibling"])
@pytest.mark.parametrize("estimator", ["mean", "backup"])
@pytest.mark.parametrize("numbers", [(4, 9, 1, 1), (6, 4, 2, 2)])
async def test_ib_branches_from_the_best_node(numbers, estimator, confidence):
    for seed in range(3):
        options = shape(*numbers, value_estimator=estimator, confidence=confidence)
        growth = Growth(Process(seed), options)
        witness = Witness(growth)
        tree = await growth.grow()
        assert witness.judged_branches == options.trajectories - options.init_rollouts
        assert any(start for _, start in growth.process.started), "never left the root"
        assert tree.trajectories == options.trajectories


class Even(Process):
    """All rewards are 1 and all steps certain, so every node scores -2 exactly with beta = 1."""

    def reward(self, tokens):
        return 1.0

    def step(self, k):
        ids = super().step(k).token_ids
        return Step(ids, (0.0,) * len(ids), (0,) * len(ids))


async def test_ties_go_to_the_shallower_then_the_older():
    growth = Growth(Even(depth=3), shape(6, 2, 6, 2, beta=1.0))
    tree = await growth.grow()
    starts = [start for number, start in sorted(growth.process.started) if number >= 6]
    first_round = range(1 + max(e.end_node for e in growth.expansions[:6]))
    inner = [n for n in first_round if tree.depth_steps(n) < 3]
    expected = sorted(inner, key=lambda n: (tree.depth_steps(n), n))[:6]
    assert {tree.depth_steps(n) for n in expected} == {0, 1, 2}
    assert starts == [n for n in expected for _ in range(2)]


async def test_independent_starts_every_rollout_from_the_prompt_at_once():
    growth = Growth(Process(), shape(4, 9, 1, 1, strategy="independent"))
    tree = await growth.grow()
    assert {start for _, start in growth.process.started} == {0}
    assert {e.round for e in growth.expansions} == {1}
    assert tree.first_round_reward == pytest.approx(tree.rewards().mean())


async def test_independent_rollouts_estimate_the_known_values():
    process = Process(seed=5)
    tree = await Growth(process, shape(800, 1, 1, 1, strategy="independent")).grow()
    for estimator in ("mean", "backup"):
        estimates = values(tree, estimator)
        seen = [n for n in range(len(tree)) if tree.visits[n] >= 50]
        assert len(seen) > 5
        for node in seen:
            exact = process.value(tree.prefix(node))
            tolerance = 4 * math.sqrt(exact * (1 - exact) / tree.visits[node])
            assert abs(estimates[node] - exact) <= tolerance + 1e-9


async def test_a_distinct_trajectory_is_graded_once():
    """One possible trajectory: all twelve rollouts end alike, four of them at the same time."""
    growth = Growth(Process(chances=[1.0]), shape(4, 5, 1, 2))
    tree = await growth.grow()
    assert list(growth.process.graded.values()) == [1]
    assert (len(tree), tree.trajectories) == (4, 12)
    assert tree.ends == [0, 0, 0, 12]
    few = Growth(Process(chances=[0.6, 0.4], depth=2), shape(8, 9, 1, 1))
    tree = await few.grow()
    assert set(few.process.graded.values()) == {1}
    assert set(few.process.graded) == {tree.prefix(n) for n in tree.end_nodes()}


@pytest.mark.parametrize("seed", range(40))
async def test_any_shape_and_token_limit(seed):
    rng = random.Random(seed)
    numbers, limit = rng.choices(range(1, 5), k=4), rng.randrange(2, 14)
    sampling = SamplingOptions(max_new_tokens=limit)
    strategy, schedule = rng.choice(list(BUILT_IN)), rng.choice(SCHEDULES)
    options = shape(*numbers, strategy=strategy, schedule=schedule, sampling=sampling)
    tree = await Growth(Process(seed), options).grow()
    assert tree.trajectories == options.trajectories
    for n in tree.end_nodes():
        length, whole = tree.depth_tokens(n), tree.prefix(n).count(CLOSE) == 3
        assert length <= limit
        assert tree.finishes[n] is (Finish.STOP if whole else Finish.LENGTH)
        assert whole or length == limit
