"""The account of one open tree, from whole paths kept in lists.

Independent of server_ext.cache.open_trees: every path is compared with every other.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile

Tokens = tuple[int, ...]
Path = tuple[str, Tokens]
"""A namespace of the cache, and tokens."""


def shared(path: Path, others: Iterable[Path]) -> int:
    """Tokens of the longest common prefix with one of the others."""

    def alike(tokens: Tokens) -> int:
        pairs = zip(path[1], tokens, strict=False)
        return len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])

    return max((alike(tokens) for namespace, tokens in others if namespace == path[0]), default=0)


class SlowOpenTree:
    def __init__(self) -> None:
        self.refilled = self.protected = 0
        self.known: list[Path] = []
        self.started: dict[str, int] = {}
        self.nodes: dict[int, Path] = {}

    def start(self, rid: str) -> None:
        self.started.setdefault(rid, len(self.known))

    def finish(self, rid: str, path: Path, prompt_tokens: int, cached: int, node: int) -> None:
        before = self.known[: self.started.pop(rid, 0)]
        self.refilled += max(min(shared(path, before), prompt_tokens - 1) - cached, 0)
        if node not in self.nodes:
            self.protected += len(path[1]) - shared(path, self.nodes.values())
            self.nodes[node] = path
        self.known.append(path)

    def evict(self, node: int, left: int, end: int) -> None:
        namespace, tokens = self.nodes.pop(node)
        self.protected -= len(tokens) - left
        if left and end not in self.nodes:
            self.nodes[end] = namespace, tokens[:left]

    def forget(self) -> None:
        self.known.clear()
        self.started.clear()
        self.nodes.clear()
        self.protected = 0
