"""Branching strategies: where the next rollouts of a tree start."""

from __future__ import annotations

from typing import Protocol

from ibtree.errors import FieldError
from ibtree.options import TreeOptions
from ibtree.score import best, candidates, ib_scores
from ibtree.tree import Tree


class Strategy(Protocol):
    """Stateless; the options are those of the tree."""

    def first(self, options: TreeOptions) -> int:
        """Rollouts from the prompt before any branching."""

    def branch(self, tree: Tree, count: int) -> list[int]:
        """Up to `count` nodes to branch from; empty when none has token budget left."""


class Independent:
    """GRPO: all G rollouts from the prompt, none from elsewhere."""

    def first(self, options: TreeOptions) -> int:
        return options.trajectories

    def branch(self, tree: Tree, count: int) -> list[int]:
        return [0] * count


class IbScore:
    """IB-TPO: the nodes of highest IB-Score (arXiv 2605.28109, algorithm 1)."""

    def first(self, options: TreeOptions) -> int:
        return options.init_rollouts

    def branch(self, tree: Tree, count: int) -> list[int]:
        return best(tree, ib_scores(tree), candidates(tree), count)


STRATEGIES: dict[str, Strategy] = {"ib": IbScore(), "independent": Independent()}
SCHEDULES = ("rounds",)


def strategy_named(name: str) -> Strategy:
    """Raises FieldError for an unknown name."""
    if name not in STRATEGIES:
        raise FieldError("options.strategy", f"unknown strategy {name!r}", " | ".join(STRATEGIES))
    return STRATEGIES[name]
