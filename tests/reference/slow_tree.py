"""A slow and obvious tree: a list of rollouts, every number recomputed from its definition.

Independent of ibtree. A node is its path: the tuple of the steps (tuples of token ids) that lead
to it; () is the root. Definitions: arXiv 2605.28109, section 4; `backup`, `sibling` and the
`draws` weights are this project's.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

Path = tuple[tuple[int, ...], ...]


class SlowStep(NamedTuple):
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]


@dataclass
class Rollout:
    """Generated `steps` from the end of `start`, which other rollouts had drawn before."""

    start: Path
    steps: list[SlowStep]
    reward: float
    finish: int

    @property
    def path(self) -> Path:
        return self.start + tuple(step.ids for step in self.steps)

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(t for ids in self.path for t in ids)

    def passes(self, node: Path) -> bool:
        return self.path[: len(node)] == node

    def drew(self, node: Path) -> bool:
        return self.passes(node) and len(node) > len(self.start)


class SlowTree:
    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []

    def insert(self, start: Path, steps: list[SlowStep], reward: float, finish: int) -> None:
        self.rollouts.append(Rollout(start, list(steps), reward, finish))

    def split(self, node: Path, at: int) -> None:
        """Rewrites history as if every step after the parent of `node` that begins with the first
        `at` tokens of `node` had been drawn as two steps."""
        k, parent, head = len(node) - 1, node[:-1], node[-1][:at]

        def concerned(path: Path) -> bool:
            if len(path) <= k or path[:k] != parent:
                return False
            return path[k][:at] == head and len(path[k]) > at

        for r in self.rollouts:
            if concerned(r.start):
                r.start = (*parent, head, r.start[k][at:], *r.start[k + 1 :])
            elif concerned(r.path):
                i = k - len(r.start)
                ids, logprobs, versions = r.steps[i]
                upper = SlowStep(ids[:at], logprobs[:at], versions[:at])
                lower = SlowStep(ids[at:], logprobs[at:], versions[at:])
                r.steps[i : i + 1] = [upper, lower]

    # --- counts ---------------------------------------------------------------------------------

    def nodes(self) -> set[Path]:
        return {r.path[:i] for r in self.rollouts for i in range(len(r.path) + 1)} | {()}

    def children(self, node: Path) -> list[Path]:
        return sorted(n for n in self.nodes() if n and n[:-1] == node)

    def visits(self, node: Path) -> int:
        return sum(r.passes(node) for r in self.rollouts)

    def draws(self, node: Path) -> int:
        return sum(r.drew(node) for r in self.rollouts)

    def starts(self, node: Path) -> int:
        return sum(r.start == node for r in self.rollouts)

    def ends(self, node: Path) -> int:
        return sum(r.path == node for r in self.rollouts)

    def reward_sum(self, node: Path) -> float:
        return math.fsum(r.reward for r in self.rollouts if r.passes(node))

    def reward(self, node: Path) -> float:
        """Of the rollouts that end with `node`: they are all alike."""
        return next(r.reward for r in self.rollouts if r.path == node)

    def finish(self, node: Path) -> int:
        return next((r.finish for r in self.rollouts if r.path == node), 0)

    def step(self, node: Path) -> SlowStep:
        """The step as it was first drawn."""
        first = next(r for r in self.rollouts if r.drew(node))
        return first.steps[len(node) - len(first.start) - 1]

    def trajectories(self) -> Counter[tuple[tuple[int, ...], float, int]]:
        """(tokens, reward, finish) of every rollout, with multiplicity."""
        return Counter((r.tokens, r.reward, r.finish) for r in self.rollouts)

    def token_prefixes(self) -> set[tuple[int, ...]]:
        """Nodes of the trie of single tokens, its root left out."""
        return {r.tokens[: i + 1] for r in self.rollouts for i in range(len(r.tokens))}

    # --- value, confidence, scores --------------------------------------------------------------

    def value(self, node: Path, estimator: str) -> float:
        if not self.rollouts:
            return 0.0
        if estimator == "mean":
            return self.reward_sum(node) / self.visits(node)
        total = self.ends(node) * self.reward(node) if self.ends(node) else 0.0
        weight = self.ends(node)
        for c in self.children(node):
            total += self.draws(c) * self.value(c, estimator)
            weight += self.draws(c)
        return total / weight

    def confidence(self, node: Path, form: str) -> float:
        if not node:
            return 1.0
        logprobs = self.step(node).logprobs
        if form == "geometric":
            return math.exp(math.fsum(logprobs) / len(logprobs))
        if form == "product":
            return math.prod(math.exp(lp) for lp in logprobs)
        siblings = self.children(node[:-1])
        return self.confidence(node, "product") / math.fsum(
            self.confidence(s, "product") for s in siblings
        )

    def info_gain(self, node: Path, estimator: str, beta: float, zero_value_ratio: float) -> float:
        if not node:
            return 0.0
        above = self.value(node[:-1], estimator)
        ratio = self.value(node, estimator) / above if above > 0 else zero_value_ratio
        return ratio - (1 + 1 / beta)

    def ib_score(
        self, node: Path, estimator: str, form: str, beta: float, zero_value_ratio: float
    ) -> float:
        kids = self.children(node)
        if not kids:
            return math.nan
        total = math.fsum(
            self.draws(c)
            * self.info_gain(c, estimator, beta, zero_value_ratio)
            * self.confidence(c, form)
            for c in kids
        )
        return (1 + beta) / sum(self.draws(c) for c in kids) * total

    def balance(self, estimator: str, form: str, beta: float, zero_value_ratio: float) -> float:
        """Mean over nodes with two children or more of E[gain conf] - E[gain] E[conf]."""
        found = []
        for node in self.nodes():
            kids = self.children(node)
            if len(kids) < 2:
                continue
            drawn = [self.draws(c) for c in kids]
            gain = [self.info_gain(c, estimator, beta, zero_value_ratio) for c in kids]
            conf = [self.confidence(c, form) for c in kids]
            n = sum(drawn)
            e_gain = sum(w * g for w, g in zip(drawn, gain, strict=True)) / n
            e_conf = sum(w * c for w, c in zip(drawn, conf, strict=True)) / n
            both = sum(w * g * c for w, g, c in zip(drawn, gain, conf, strict=True)) / n
            found.append(both - e_gain * e_conf)
        return sum(found) / len(found) if found else math.nan

    # --- weights --------------------------------------------------------------------------------

    def trajectory_weight(self, node: Path, how: str) -> float:
        """Of all the trajectories that end with `node` together."""
        if how == "visits":
            return self.ends(node) / len(self.rollouts)
        weight = 1.0
        for i in range(len(node)):
            below = self.ends(node[:i]) + sum(self.draws(c) for c in self.children(node[:i]))
            weight *= self.draws(node[: i + 1]) / below
        return (
            weight
            * self.ends(node)
            / (self.ends(node) + sum(self.draws(c) for c in self.children(node)))
        )
