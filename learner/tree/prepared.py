"""What was made of trees ahead of their step, kept as long as each tree is."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from ibtree.tree import Tree

T = TypeVar("T")


class PreparedTrees(Generic[T]):
    """Calls `make` for trees that were not prepared; trees are told apart by identity."""

    def __init__(self, make: Callable[[Tree], T]) -> None:
        self._make = make
        self._made: dict[int, T] = {}

    def __len__(self) -> int:
        return len(self._made)

    def __call__(self, tree: Tree) -> T:
        made = self._made.get(id(tree))
        return self._make(tree) if made is None else made

    def prepare(self, tree: Tree) -> None:
        self._made[id(tree)] = self._make(tree)
        weakref.finalize(tree, self._made.pop, id(tree), None)
