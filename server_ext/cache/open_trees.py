"""Which cached prefixes belong to open trees: pure bookkeeping for the radix backend.

No clock, no SGLang: every rank that gets the same calls takes the same decisions.

open ── rollouts finish: their paths are protected ──▶ close | deadline passed: released, accounted
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from server_ext.cache.path_trie import Key, PathTrie, Run


@dataclass(frozen=True)
class TreeAccount:
    """What one tree reused. [tokens]

    `refilled` were computed again although the tree had them cached under the same weights: they
    were evicted while it was open. `protected` is what its paths held, each token once.
    """

    asked: int = 0
    cached: int = 0
    refilled: int = 0
    protected: int = 0


@dataclass(eq=False)
class Path:
    """A finished rollout of a tree, from the prompt on: what is left of it in the cache."""

    tree: _OpenTree
    end: Run
    namespace: tuple[str | None, ...]

    @property
    def key(self) -> Key:
        return Key(self.end.path(), self.namespace)


@dataclass(eq=False)
class _OpenTree:
    name: str
    order: int
    deadline_s: float
    asked: int = 0
    cached: int = 0
    refilled: int = 0
    protected: int = 0
    known: PathTrie = field(default_factory=PathTrie)
    """What the tree ever had cached under the current weights."""
    started: dict[str, int] = field(default_factory=dict)
    """How many paths were known when a request first looked for its prefix, by its id."""
    nodes: dict[int, Path] = field(default_factory=dict)


class OpenTrees:
    """Open trees in the order they were opened, and the cache nodes their paths end at.

    A cache node can only become evictable after everything below it is gone, so the ends are all
    that has to be known. Beyond `capacity_tokens` the oldest trees are not protected. A request
    belongs to the tree whose name is its id up to the last "/".
    """

    def __init__(self, capacity_tokens: int, page_tokens: int = 1) -> None:
        """`page_tokens`: the cache finds whole pages of so many tokens only."""
        self.capacity_tokens, self._page_tokens = capacity_tokens, page_tokens
        self.evicted_tokens = 0
        """Tokens of open trees that were evicted, ever."""
        self.digest = 0
        """Checksum of every decision so far: equal on ranks that decided the same."""
        self._trees: dict[str, _OpenTree] = {}
        self._ends: dict[int, list[Path]] = {}
        self._opened = 0
        self._floor = 0
        """Trees opened before this one are not protected."""

    def __len__(self) -> int:
        return len(self._trees)

    @property
    def protected_tokens(self) -> int:
        """What the open trees hold [tokens]; a prefix of two trees counts for both."""
        return sum(tree.protected for tree in self._trees.values())

    def open(self, name: str, deadline_s: float) -> None:
        """Opens the tree, or moves its deadline (seconds on the sender's clock)."""
        if tree := self._trees.get(name):
            tree.deadline_s = deadline_s
            return
        self._trees[name] = _OpenTree(name, self._opened, deadline_s)
        self._opened += 1
        self._note("open", name)

    def close(self, name: str) -> TreeAccount:
        """Releases the tree; an unknown one (expired, never opened) has an empty account."""
        tree = self._trees.pop(name, None)
        if tree is None:
            return TreeAccount()
        self._note("close", name)
        account = TreeAccount(tree.asked, tree.cached, tree.refilled, tree.protected)
        self._forget(tree)
        self._lower_floor()
        return account

    def expire(self, now_s: float) -> list[str]:
        """Releases trees whose deadline passed, on the sender's clock. Returns their names."""
        late = [tree.name for tree in self._trees.values() if tree.deadline_s < now_s]
        for name in late:
            self.close(name)
        return late

    def forget_paths(self) -> None:
        """The cache was flushed, or the weights changed: nothing cached can be hit again."""
        for tree in self._trees.values():
            self._forget(tree)
            tree.known = PathTrie()
            tree.started.clear()
        self._note("forget", "")
        self._lower_floor()

    def started(self, rid: str) -> None:
        """The request looks for its prefix, perhaps not for the first time."""
        if tree := self._of(rid):
            tree.started.setdefault(rid, tree.known.paths)

    def finished(
        self, rid: str, path: Key, prompt_tokens: int, cached_tokens: int, node: int
    ) -> None:
        """The request's `path`, its prompt and what it generated, is in the cache and ends at
        `node`; `cached_tokens` of the prompt were found there when it started."""
        tree = self._of(rid)
        if tree is None:
            return
        tree.asked += prompt_tokens
        tree.cached += cached_tokens
        overlap = tree.known.overlap(path)
        known, covered = overlap.earlier(tree.started.pop(rid, 0)), overlap.held()
        # the engine computes a prompt's last token in any case, and what is left of its last page
        findable = min(known, prompt_tokens - 1) // self._page_tokens * self._page_tokens
        tree.refilled += max(findable - cached_tokens, 0)
        end = tree.known.add(path, overlap)
        if node not in tree.nodes:
            tree.protected += end.depth - covered
            self._protect(Path(tree, end, path.namespace), node)
        self._lower_floor()

    def protects(self, node: int) -> bool:
        """Whether a path of a protected tree ends at the node."""
        return any(path.tree.order >= self._floor for path in self._ends.get(node, ()))

    def key_of(self, node: int) -> Key:
        """The key of the paths that end at the node."""
        return self._ends[node][0].key

    def expose_oldest(self) -> bool:
        """The oldest protected tree may be evicted until `restore`. False: none is left."""
        for tree in self._trees.values():
            if tree.order >= self._floor and tree.nodes:
                self._floor = tree.order + 1
                self._note("expose", tree.name)
                return True
        return False

    def restore(self) -> None:
        """Ends what `expose_oldest` began."""
        self._lower_floor()

    def evicted(self, node: int) -> list[Path]:
        """The node is gone. Returns the paths that ended there: for each, say with `shortened`
        how much of it is left."""
        self._note("gone", str(node))
        paths = self._ends.pop(node, [])
        for path in paths:
            del path.tree.nodes[node]
            path.end.hold(-1)
        return paths

    def shortened(self, path: Path, left: int, node: int) -> None:
        """The first `left` tokens of an evicted path remain and end in `node`."""
        lost = path.end.depth - left
        path.end = path.end.cut(left)
        path.tree.protected -= lost
        self.evicted_tokens += lost
        self._note("evicted", f"{path.tree.name} {lost}")
        if left and node not in path.tree.nodes:  # else another of its paths covers the rest
            self._protect(path, node)

    def _of(self, rid: str) -> _OpenTree | None:
        return self._trees.get(rid.rpartition("/")[0])

    def _protect(self, path: Path, node: int) -> None:
        path.end.hold()
        path.tree.nodes[node] = path
        self._ends.setdefault(node, []).append(path)

    def _forget(self, tree: _OpenTree) -> None:
        for node in tree.nodes:
            paths = self._ends[node]
            paths[:] = [path for path in paths if path.tree is not tree]
            if not paths:
                del self._ends[node]
        tree.nodes.clear()
        tree.protected = 0

    def _lower_floor(self) -> None:
        """Protects as many trees as fit into the capacity, the newest first."""
        self._floor, room = 0, self.capacity_tokens
        for tree in reversed(self._trees.values()):
            room -= tree.protected
            if room < 0:
                self._floor = tree.order + 1
                return

    def _note(self, what: str, which: str) -> None:
        self.digest = zlib.crc32(f"{what} {which}".encode(), self.digest)
