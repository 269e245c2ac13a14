"""A trie of token paths: what paths share is kept once, and adding one costs its new part.

(root) ── prompt ──┬── run ──┬── run      a path ends with a run; a run that a path leaves
                   └── run   └── run      half-way is split there
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Key:
    """Token ids (int64) in a namespace of the cache; those of two have nothing in common."""

    tokens: array[int]
    namespace: tuple[str | None, ...] = ()


@dataclass(eq=False, slots=True)
class Run:
    """Tokens between two branchings of the trie."""

    above: Run | None
    tokens: Tokens
    depth: int
    """Tokens of the path that ends here."""
    first: int
    """Number of the first path that went through it."""
    holders: int = 0
    """How many paths are held that go through it."""
    below: dict[int, Run] = field(default_factory=dict)
    """By their first token."""

    def upwards(self) -> list[Run]:
        """This run, those before it, the root."""
        runs: list[Run] = []
        run: Run | None = self
        while run is not None:
            runs.append(run)
            run = run.above
        return runs

    def split(self, at: int) -> Run:
        """Its first `at` tokens as a run of their own; what ends with this one still does."""
        assert self.above is not None
        depth = self.depth - len(self.tokens) + at
        upper = Run(self.above, self.tokens[:at], depth, self.first, self.holders)
        self.above.below[int(self.tokens[0])] = upper
        self.above, self.tokens = upper, self.tokens[at:]
        upper.below[int(self.tokens[0])] = self
        return upper

    def hold(self, count: int = 1) -> None:
        """Counts a path that ends here as held; -1: as held no more."""
        for run in self.upwards():
            run.holders += count

    def cut(self, depth: int) -> Run:
        """The run with which the path's first `depth` tokens end."""
        run = self
        while run.above is not None and run.above.depth >= depth:
            run = run.above
        return run if run.depth == depth else run.split(depth - run.depth + len(run.tokens))

    def path(self) -> array[int]:
        """Every token from the root to its end."""
        tokens = array("q")
        for run in reversed(self.upwards()):
            tokens.frombytes(run.tokens.tobytes())
        return tokens


@dataclass(frozen=True)
class Overlap:
    """What a path shares with the trie: runs from the root, and how many tokens of each."""

    runs: Sequence[tuple[Run, int]]

    def earlier(self, number: int) -> int:
        """Tokens that it shares with one of the paths before that number."""
        return sum(tokens for run, tokens in self.runs if run.first < number)

    def held(self) -> int:
        """Tokens that it shares with a path that is held."""
        return sum(tokens for run, tokens in self.runs if run.holders)


class PathTrie:
    """Paths, numbered in the order they were added."""

    def __init__(self) -> None:
        self.paths = 0
        self._roots: dict[tuple[str | None, ...], Run] = {}

    def overlap(self, key: Key) -> Overlap:
        """What the path shares with those already there."""
        tokens, runs, at = np.asarray(key.tokens, np.int64), list[tuple[Run, int]](), 0
        run = self._roots.get(key.namespace)
        while run is not None and at < len(tokens):
            run = run.below.get(int(tokens[at]))
            if run is not None:
                shared = _common(run.tokens, tokens[at:])
                runs.append((run, shared))
                at += shared
                if shared < len(run.tokens):
                    break
        return Overlap(runs)

    def add(self, key: Key, overlap: Overlap) -> Run:
        """The run with which the path ends; `overlap` is what it shares now."""
        root = Run(None, np.zeros(0, np.int64), 0, 0)
        end = self._roots.setdefault(key.namespace, root)
        if overlap.runs:
            end, shared = overlap.runs[-1]
            end = end if shared == len(end.tokens) else end.split(shared)
        if end.depth < len(key.tokens):
            rest = np.array(key.tokens[end.depth :], np.int64)
            run = Run(end, rest, len(key.tokens), self.paths)
            end.below[int(rest[0])] = run
            end = run
        self.paths += 1
        return end


def _common(a: Tokens, b: Tokens) -> int:
    """Length of the common prefix [tokens]."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    at = int(differ.argmax()) if n else 0
    return at if n and differ[at] else n
