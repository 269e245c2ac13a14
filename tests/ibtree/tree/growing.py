"""Random trees, grown step for step in ibtree.Tree and in the slow reference."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

from ibtree.tree import Finish, Step, Tree
from ibtree.tree.options import TreeOptions
from tests.reference.slow_tree import Path, SlowStep, SlowTree

STEPS = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4
)
STARTS = st.integers(0, 10**6)
# (which node to start from, the steps), for each rollout; about half start from the prompt
PLANS = st.lists(st.tuples(st.one_of(st.just(0), STARTS), STEPS), min_size=1, max_size=10)


def path_of(tree: Tree, node: int) -> Path:
    return tuple(tree.steps[n].token_ids for n in tree.path(node))


def step_of(ids: tuple[int, ...], logprob: float = -0.5, version: int = 0) -> Step:
    return Step(ids, (logprob,) * len(ids), (version,) * len(ids))


def trajectories(tree: Tree) -> Counter[tuple[tuple[int, ...], float, int]]:
    counts: Counter[tuple[tuple[int, ...], float, int]] = Counter()
    for n in tree.end_nodes():
        counts[tree.prefix(n), round(tree.reward(n), 9), int(tree.finishes[n])] += tree.ends[n]
    return counts


def alive_nodes(tree: Tree) -> list[int]:
    return [n for n in range(len(tree)) if tree.alive(n) == n]


@dataclass
class Pair:
    """Both trees. `levels`: number of distinct rewards. `distinct`: log-probabilities and versions
    differ between draws of one step (floats of an engine do), else they follow from the tokens."""

    levels: int = 3
    distinct: bool = True
    options: TreeOptions = field(default_factory=TreeOptions)

    def __post_init__(self) -> None:
        self.fast = Tree(prompt=(7, 8), options=self.options)
        self.slow = SlowTree()

    def reward(self, tokens: tuple[int, ...]) -> float:
        """A function of the full token sequence."""
        return (zlib.crc32(bytes(tokens)) % self.levels) / max(self.levels - 1, 1)

    def step(self, before: tuple[int, ...], ids: tuple[int, ...]) -> SlowStep:
        draw = len(self.slow.rollouts) if self.distinct else 0
        seeds = [bytes((*before, *ids[: i + 1], 200 + draw)) for i in range(len(ids))]
        # multiples of 1/64: exact as the wire's 32-bit floats
        return SlowStep(
            ids, tuple(-(zlib.crc32(s) % 160) / 64 for s in seeds), (draw // 2,) * len(ids)
        )

    def insert(self, start: int, steps: list[tuple[int, ...]]) -> int:
        before = self.fast.prefix(start)
        drawn = []
        for ids in steps:
            drawn.append(self.step(before, ids))
            before += ids
        reward = self.reward(before)
        finish = Finish.STOP if zlib.crc32(bytes(before)) & 256 else Finish.LENGTH
        self.slow.insert(path_of(self.fast, start), drawn, reward, int(finish))
        return self.fast.insert(start, [Step(*s) for s in drawn], reward, finish)

    def split(self, node: int, at: int) -> int:
        self.slow.split(path_of(self.fast, node), at)
        return self.fast.split(node, at)

    def inner(self) -> list[int]:
        """Where a rollout may start: the root and the nodes with children."""
        return [n for n in alive_nodes(self.fast) if n == 0 or not self.fast.is_leaf(n)]

    def grow(self, plan: list[tuple[int, list[tuple[int, ...]]]]) -> Pair:
        for pick, steps in plan:
            starts = self.inner()
            self.insert(starts[pick % len(starts)], steps)
        return self

    def splittable(self) -> list[tuple[int, int]]:
        return [
            (n, at)
            for n in alive_nodes(self.fast)
            for at in range(1, len(self.fast.steps[n].token_ids))
        ]

    def split_some(self, picks: list[int]) -> Pair:
        for pick in picks:
            if splits := self.splittable():
                self.split(*splits[pick % len(splits)])
        return self

    def check_counts(self) -> None:
        """Every count of every node, path by path, and the shape itself."""
        fast, slow = self.fast, self.slow
        fast.validate()
        nodes = {path_of(fast, n): n for n in alive_nodes(fast)}
        assert set(nodes) == slow.nodes()
        assert sorted(fast.topological()) == sorted(nodes.values())
        assert fast.trajectories == len(slow.rollouts)
        assert fast.unique_tokens == sum(len(path[-1]) for path in nodes if path)
        assert fast.inner_nodes() == sorted(n for n in nodes.values() if fast.children(n))
        for path, n in nodes.items():
            assert (fast.visits[n], fast.draws[n]) == (slow.visits(path), slow.draws(path))
            assert (fast.starts[n], fast.ends[n]) == (slow.starts(path), slow.ends(path))
            assert math.isclose(fast.reward_sums[n], slow.reward_sum(path), abs_tol=1e-9)
            assert fast.finishes[n] == slow.finish(path)
            assert {path_of(fast, c) for c in fast.children(n)} == set(slow.children(path))
            assert fast.depth_steps(n) == len(path)
            assert fast.depth_tokens(n) == len(fast.prefix(n)) == sum(map(len, path))
            assert fast.lengths[n] == len(path[-1] if path else ())
            assert math.isclose(fast.logprob_sums[n], sum(fast.steps[n].logprobs), abs_tol=1e-9)
            if fast.ends[n]:
                assert math.isclose(fast.reward(n), slow.reward(path), abs_tol=1e-9)
            else:
                assert math.isnan(fast.reward(n))

    def check_first_draws(self) -> None:
        """A shared step keeps the log-probabilities and versions of its first draw."""
        for n in alive_nodes(self.fast):
            if n:
                step, first = self.fast.steps[n], self.slow.step(path_of(self.fast, n))
                assert (step.token_ids, step.logprobs, step.versions) == tuple(first)


def find(tree: Tree, start: int, steps: Sequence[Step]) -> int | None:
    """The node that `steps` lead to from `start`; None if the path is new."""
    node: int | None = start
    for step in steps:
        below = [] if node is None else tree.children(node)
        node = next((n for n in below if tree.steps[n].token_ids == step.token_ids), None)
    return node
