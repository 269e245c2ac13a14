"""The Tree: a trie of reasoning steps in columns; node ids are indices, node 0 is the prompt's end.

Counts (names of arXiv 2605.28109): `visits` rollouts through a node, `draws` times it was sampled
from its parent, `starts` rollouts started from its end, `ends` rollouts that end with it. Always

    visits(s)        = ends(s) + sum over children c of visits(c)
    sum_c draws(c)   = draws(s) - ends(s) + starts(s)            with draws(root) = 0
    ends(s)         <= draws(s)                                  as a rollout has a step
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from itertools import chain

import numpy as np
import numpy.typing as npt

from ibtree.tree.options import TreeOptions

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Finish(IntEnum):
    """How the rollouts that end with a node ended."""

    NONE = 0
    STOP = 1
    LENGTH = 2


class StopCause(IntEnum):
    """Why a tree stopped growing."""

    GROWING = 0
    COMPLETE = 1
    NO_CANDIDATE = 2
    DEADLINE = 3
    TOKEN_BUDGET = 4
    MAX_TRAJECTORIES = 5


@dataclass(frozen=True)
class Step:
    """A span of generated tokens: ids, ln-probabilities at the sampling temperature [nats], and
    the weight version that generated each; all of the same length, at least 1."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.token_ids) == len(self.logprobs) == len(self.versions) >= 1:
            raise ValueError(
                f"a step needs ids, log-probabilities and versions of one length >= 1, got "
                f"{len(self.token_ids)}, {len(self.logprobs)}, {len(self.versions)}"
            )

    @cached_property
    def logprob(self) -> float:
        """ln-probability of the whole step [nats]."""
        return sum(self.logprobs)

    @cached_property
    def likeliest_fork(self) -> tuple[float, int]:
        """The lowest log-probability [nats] behind the first token, and where; (inf, 0): none."""
        inner = self.logprobs[1:]
        lowest = min(inner, default=float("inf"))
        return lowest, inner.index(lowest) + 1 if inner else 0

    def cut(self, at: int) -> tuple[Step, Step]:
        """The first `at` tokens and the rest."""
        head = Step(self.token_ids[:at], self.logprobs[:at], self.versions[:at])
        return head, Step(self.token_ids[at:], self.logprobs[at:], self.versions[at:])


@dataclass
class Ledger:
    """What a tree cost; units and meanings as in protos/ibtree/v1/tree.proto."""

    generated_tokens: int = 0
    prefix_tokens: int = 0
    cached_tokens: int = 0
    wall_s: float = 0.0
    queue_s: float = 0.0
    refilled_tokens: int = 0
    protected_tokens: int = 0
    seed: int = 0


_ROOT = Step.__new__(Step)  # the one step without tokens
for _name in ("token_ids", "logprobs", "versions"):
    object.__setattr__(_ROOT, _name, ())


@dataclass
class Tree:
    """Grown by `insert`; `parents[i] < i` holds until a `split` (which adds an inner node).

    `born` orders the nodes by their first draw: the id, or after a split that of the oldest part.
    """

    prompt: tuple[int, ...]
    tree_id: str = ""
    model_id: str = ""
    answer: str = ""
    options: TreeOptions = field(default_factory=TreeOptions)
    ledger: Ledger = field(default_factory=Ledger)
    stop_cause: StopCause = StopCause.GROWING
    first_round_reward: float | None = None
    parents: list[int] = field(default_factory=lambda: [0])
    steps: list[Step] = field(default_factory=lambda: [_ROOT])
    draws: list[int] = field(default_factory=lambda: [0])
    visits: list[int] = field(default_factory=lambda: [0])
    starts: list[int] = field(default_factory=lambda: [0])
    ends: list[int] = field(default_factory=lambda: [0])
    reward_sums: list[float] = field(default_factory=lambda: [0.0])
    finishes: list[Finish] = field(default_factory=lambda: [Finish.NONE])
    born: list[int] = field(default_factory=lambda: [0])
    lengths: array[int] = field(default_factory=lambda: array("q", [0]))
    """Tokens of each step; 0 for the root and for what a `split` merged away."""
    depths_tokens: array[int] = field(default_factory=lambda: array("q", [0]))
    """Tokens from the prompt's end to the end of each node."""
    depths_steps: array[int] = field(default_factory=lambda: array("q", [0]))
    logprob_sums: array[float] = field(default_factory=lambda: array("d", [0.0]))
    """ln-probability of each whole step [nats]."""
    step_unit: str = ""
    """What closed its steps: text, paragraph, line or sentence; empty: unknown."""
    texts: list[str] = field(default_factory=list)
    """The text of each node, where the tree came over the wire with them."""
    _children: list[dict[tuple[int, ...], int]] = field(default_factory=lambda: [{}])

    def __len__(self) -> int:
        """Number of nodes, the root included."""
        return len(self.parents)

    @property
    def trajectories(self) -> int:
        """G: rollouts in the tree."""
        return self.visits[0]

    @property
    def oldest_version(self) -> int:
        """The oldest weights that generated a token of it; 0 for a tree without any."""
        return min((min(step.versions) for step in self.steps if step.versions), default=0)

    @property
    def unique_tokens(self) -> int:
        """Generated tokens, each counted once."""
        return sum(self.lengths)

    def children(self, node: int) -> list[int]:
        return list(self._children[node].values())

    def is_leaf(self, node: int) -> bool:
        return not self._children[node]

    def inner_nodes(self) -> list[int]:
        """Nodes with children, in order of their ids."""
        return [node for node, children in enumerate(self._children) if children]

    def path(self, node: int) -> list[int]:
        """Nodes from below the root to `node`, both ends included (empty for the root)."""
        up = []
        while node:
            up.append(node)
            node = self.parents[node]
        return up[::-1]

    def prefix(self, node: int) -> tuple[int, ...]:
        """Token ids generated from the prompt's end to the end of `node`."""
        return tuple(chain.from_iterable(self.steps[n].token_ids for n in self.path(node)))

    def depth_tokens(self, node: int) -> int:
        """Generated tokens from the prompt's end to the end of `node`."""
        return self.depths_tokens[node]

    def depth_steps(self, node: int) -> int:
        return self.depths_steps[node]

    def reward(self, node: int) -> float:
        """Reward of the rollouts that end with `node`; NaN if none does.

        Rollouts with the same tokens have the same reward, so it follows from the sums.
        """
        if not self.ends[node]:
            return float("nan")
        below = sum(self.reward_sums[c] for c in self._children[node].values())
        return (self.reward_sums[node] - below) / self.ends[node]

    def end_nodes(self) -> list[int]:
        """Nodes with which at least one rollout ends."""
        return [n for n, ends in enumerate(self.ends) if ends]

    def rewards(self) -> Floats:
        """Reward of each of the G trajectories, shape [G]."""
        nodes = self.end_nodes()
        return np.repeat([self.reward(n) for n in nodes], [self.ends[n] for n in nodes])

    def topological(self) -> Iterator[int]:
        """Every node, parents before children, older siblings first."""
        queue = [0]
        for node in queue:
            yield node
            queue.extend(self._children[node].values())

    def insert(self, start: int, steps: Sequence[Step], reward: float, finish: Finish) -> int:
        """Adds one finished rollout started from the end of `start`; returns the node it ends with.

        A step already there is shared: it keeps the log-probabilities of its first draw. Raises
        ValueError for no steps or a reward outside [0, 1]; the tree is then unchanged.
        """
        if not steps:
            raise ValueError("a rollout needs at least one step")
        if not 0.0 <= reward <= 1.0:
            raise ValueError(f"reward {reward} is outside [0, 1]")
        if not 0 <= start < len(self) or self.alive(start) != start:
            raise ValueError(f"no node {start}")
        self.starts[start] += 1
        for node in (0, *self.path(start)):
            self.visits[node] += 1
            self.reward_sums[node] += reward
        node = start
        for step in steps:
            node = self.graft(node, step)
            self.draws[node] += 1
            self.visits[node] += 1
            self.reward_sums[node] += reward
        self.ends[node] += 1
        self.finishes[node] = finish
        return node

    def set_reward(self, node: int, reward: float) -> None:
        """Gives the rollouts that end with `node` another reward. Raises ValueError if there are
        none, or for a reward outside [0, 1]; the tree is then unchanged."""
        if not 0.0 <= reward <= 1.0:
            raise ValueError(f"reward {reward} is outside [0, 1]")
        if not (0 <= node < len(self) and self.ends[node]):
            raise ValueError(f"no rollout ends with node {node}")
        change = (reward - self.reward(node)) * self.ends[node]
        for above in (0, *self.path(node)):
            self.reward_sums[above] += change

    def graft(self, parent: int, step: Step) -> int:
        """The child of `parent` with these tokens, made without counting if it is new."""
        child = self._children[parent].get(step.token_ids)
        return self._add(parent, step) if child is None else child

    def _add(self, parent: int, step: Step) -> int:
        node = len(self.parents)
        self.parents.append(parent)
        self.steps.append(step)
        self.lengths.append(len(step.token_ids))
        self.depths_tokens.append(self.depths_tokens[parent] + len(step.token_ids))
        self.depths_steps.append(self.depths_steps[parent] + 1)
        self.logprob_sums.append(step.logprob)
        for counts in (self.draws, self.visits, self.starts, self.ends):
            counts.append(0)
        self.reward_sums.append(0.0)
        self.finishes.append(Finish.NONE)
        self._children.append({})
        self.born.append(node)
        self._children[parent][step.token_ids] = node
        return node

    def split(self, node: int, at: int) -> int:
        """Cuts a step after its first `at` tokens; returns the upper part.

        Every sibling that begins with those tokens is folded: the upper part is shared, draws and
        visits add up, and what lies below merges where its tokens are equal. A node merged away
        stays as an empty entry that `alive` maps to the node that replaced it, so ids held by
        rollouts in flight stay good. Raises ValueError unless 0 < at < the step's length.
        """
        if not (0 < node < len(self) and 0 < at < len(self.steps[node].token_ids)):
            raise ValueError(f"cannot split node {node} at {at}")
        parent, head = self.parents[node], self.steps[node].token_ids[:at]
        siblings = self._children[parent]
        folded = [s for ids, s in siblings.items() if ids[:at] == head]
        folded.sort(key=lambda s: self.born[s])
        for s in folded:
            del siblings[self.steps[s].token_ids]
        first_draw = self.steps[folded[0]]
        whole = [s for s in folded if len(self.steps[s].token_ids) == at]
        upper = whole[0] if whole else self._add(parent, first_draw)
        self._put(upper, first_draw.cut(at)[0] if len(first_draw.token_ids) > at else first_draw)
        self.depths_tokens[upper] = self.depths_tokens[parent] + at
        self._children[parent].pop(first_draw.token_ids, None)
        siblings[head] = upper
        self.born[upper] = self.born[folded[0]]
        for s in folded:
            if s != upper:
                self.draws[upper] += self.draws[s]
                self.visits[upper] += self.visits[s]
                self.reward_sums[upper] += self.reward_sums[s]
                self._put(s, self.steps[s].cut(at)[1])
                self._hang(s, upper)
        below = [upper]
        for s in below:
            for child in self._children[s].values():
                self.depths_steps[child] = self.depths_steps[s] + 1
                below.append(child)
        return upper

    def _put(self, node: int, step: Step) -> None:
        """Gives the node another step."""
        self.steps[node], self.lengths[node] = step, len(step.token_ids)
        self.logprob_sums[node] = step.logprob

    def alive(self, node: int) -> int:
        """The node itself, or the one it was merged into by a `split`."""
        while node and not self.visits[node]:
            node = self.parents[node]
        return node

    def _hang(self, node: int, parent: int) -> None:
        """Makes `node` a child of `parent`, merging it into a child with the same tokens."""
        twin = self._children[parent].get(self.steps[node].token_ids)
        if twin is None:
            self.parents[node] = parent
            self._children[parent][self.steps[node].token_ids] = node
            return
        if self.born[node] < self.born[twin]:
            self.born[twin] = self.born[node]
            self._put(twin, self.steps[node])  # keep the log-probabilities of the first draw
        for counts in (self.draws, self.visits, self.starts, self.ends):
            counts[twin] += counts[node]
            counts[node] = 0
        self.reward_sums[twin] += self.reward_sums[node]
        self.reward_sums[node] = 0.0
        self.finishes[twin] = self.finishes[twin] or self.finishes[node]
        orphans = self.children(node)
        self._children[node] = {}
        self._put(node, _ROOT)
        self.parents[node], self.finishes[node] = twin, Finish.NONE
        for orphan in orphans:
            self._hang(orphan, twin)

    def validate(self) -> None:
        """Raises ValueError where a count breaks an invariant (see the module's docstring)."""
        for s in range(len(self)):
            kids = self.children(s)
            if self.visits[s] != self.ends[s] + sum(self.visits[c] for c in kids):
                raise ValueError(f"node {s}: visits {self.visits[s]} != ends + children's visits")
            if sum(self.draws[c] for c in kids) != self.draws[s] - self.ends[s] + self.starts[s]:
                raise ValueError(f"node {s}: children's draws do not match draws - ends + starts")
            if s and self.visits[s] and not self.draws[s]:
                raise ValueError(f"node {s}: draws 0 of a visited node")
            if self.ends[s] > self.draws[s]:
                raise ValueError(f"node {s}: ends {self.ends[s]} > draws: a rollout of no steps")
            own = self.reward_sums[s] - sum(self.reward_sums[c] for c in kids)
            if not -1e-9 <= own <= self.ends[s] + 1e-9:
                raise ValueError(f"node {s}: reward sums do not add up")
            if (self.finishes[s] is Finish.NONE) != (self.ends[s] == 0):
                raise ValueError(f"node {s}: finish_reasons do not fit ends")
        if self.draws[0]:
            raise ValueError(f"root: draws {self.draws[0]} != 0")
