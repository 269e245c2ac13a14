"""Branching strategies: where the next rollouts of a tree start."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Set
from functools import cache
from importlib.metadata import entry_points
from typing import Protocol

from ibtree.errors import FieldError
from ibtree.tree import Floats, Tree
from ibtree.tree.options import TreeOptions
from ibtree.tree.score import (
    best,
    budget_scores,
    candidates,
    ib_scores,
    unlikeliest_token,
)

ENTRY_POINTS = "ibtpo.strategies"


class Strategy(Protocol):
    """Stateless; the options are those of the tree."""

    def first(self, options: TreeOptions) -> int:
        """Rollouts from the prompt before any branching."""

    def branch(self, tree: Tree, count: int, busy: Set[int]) -> list[int]:
        """Up to `count` nodes to branch from; empty when none has token budget left. A node in
        `busy` has a rollout in flight: it is a candidate only when no other is."""


def _free(tree: Tree, busy: Set[int]) -> list[int]:
    among = candidates(tree)
    return [node for node in among if node not in busy] or among


class Independent:
    """GRPO: all G rollouts from the prompt, none from elsewhere."""

    def first(self, options: TreeOptions) -> int:
        return options.trajectories

    def branch(self, tree: Tree, count: int, busy: Set[int]) -> list[int]:
        return [0] * count


class _Branching:
    """B0 rollouts from the prompt, then branches."""

    def first(self, options: TreeOptions) -> int:
        return options.init_rollouts


class IbScore(_Branching):
    """IB-TPO: the nodes of highest IB-Score (arXiv 2605.28109, algorithm 1)."""

    def scores(self, tree: Tree) -> Floats:
        return ib_scores(tree)

    def branch(self, tree: Tree, count: int, busy: Set[int]) -> list[int]:
        return best(tree, self.scores(tree), _free(tree, busy), count)


class IbBudget(IbScore):
    """Ours: by IB-Score and by what a rollout from there costs."""

    def scores(self, tree: Tree) -> Floats:
        return budget_scores(tree)


class Random(_Branching):
    """Uniform over the nodes that may be branched from."""

    def branch(self, tree: Tree, count: int, busy: Set[int]) -> list[int]:
        among = _free(tree, busy)
        return random.sample(among, min(count, len(among)))


class FixedWidth(_Branching):
    """Branches at equal intervals of depth along each of the first rollouts in turn (the fixed
    divergence of TreePO, arXiv 2508.17445)."""

    def branch(self, tree: Tree, count: int, busy: Set[int]) -> list[int]:
        allowed, options = set(candidates(tree)), tree.options
        if not allowed:
            return []
        ends = sorted(tree.end_nodes(), key=lambda n: tree.born[n])[: options.init_rollouts]
        trunks = [[0, *tree.path(end)] for end in ends]
        depths = -(-(options.trajectories - options.init_rollouts) // len(trunks))
        fork_nodes = [
            trunk[round(depth / (depths + 1) * (len(trunk) - 1))]
            for depth in range(1, depths + 1)
            for trunk in trunks
        ]
        used = Counter(busy)
        used.update({node: tree.starts[node] for node in fork_nodes})
        used[0] -= options.init_rollouts
        chosen: list[int] = []
        for _ in range(count):
            node = min((n for n in fork_nodes if n in allowed), key=used.__getitem__, default=0)
            used[node] += 1
            chosen.append(node)
        return chosen


class Entropy(_Branching):
    """Forks before the tokens of highest surprisal, within steps too (TreeRL, arXiv 2506.11902).

    A token is a fork only once; the node it lies in is split there.
    """

    def branch(self, tree: Tree, count: int, busy: Set[int]) -> list[int]:
        chosen: list[int] = []
        for _ in range(count):  # one by one: a split may fold others away
            fork = unlikeliest_token(tree, {*busy, *chosen})
            if fork is None:
                return [tree.alive(n) for n in chosen] or _free(tree, busy)[:count]
            node, at = fork
            chosen.append(tree.split(node, at) if at else tree.parents[node])
        return [tree.alive(node) for node in chosen]


BUILT_IN: dict[str, Strategy] = {
    "ib": IbScore(),
    "ib_budget": IbBudget(),
    "independent": Independent(),
    "random": Random(),
    "fixed_width": FixedWidth(),
    "entropy": Entropy(),
}


@cache
def strategies() -> dict[str, Strategy]:
    """Strategies by name; installed packages add theirs under the entry point `ibtpo.strategies`:
    a class without arguments. Built-in names win."""
    theirs = {point.name: point.load()() for point in entry_points(group=ENTRY_POINTS)}
    return theirs | BUILT_IN


def strategy_named(name: str) -> Strategy:
    """Raises FieldError for an unknown name."""
    if name not in strategies():
        allowed = " | ".join(strategies())
        raise FieldError("options.strategy", f"unknown strategy {name!r}", allowed)
    return strategies()[name]
