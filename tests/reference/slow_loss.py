"""Slow and obvious advantages and loss of IB-TPO: loops over rollouts and tokens, plain floats.

Independent of learner and of torch. A tree is a SlowTree, a policy is a function
(prompt, generated tokens so far) -> ln-probability of the last of them. Definitions:
arXiv 2605.28109, section 4; k3 is http://joschu.net/blog/kl-approx.html; `token` is DAPO
(arXiv 2503.14476), `constant` Dr. GRPO (arXiv 2503.20783).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.reference.slow_tree import Path, Rollout, SlowStep, SlowTree

Tokens = tuple[int, ...]
Policy = Callable[[Tokens, Tokens], float]


@dataclass(frozen=True)
class Setting:
    """The options that enter advantages and loss; defaults are the paper's."""

    beta: float = 5.0
    zero_value_ratio: float = 0.0
    value_estimator: str = "mean"
    confidence: str = "geometric"
    local_weight: float = 0.1
    local_scale: str = "token"
    local_reference: str = "behaviour"
    std: str = "population"
    advantage_eps: float = 0.0
    trajectory_weight: str = "visits"
    length_norm: str = "trajectory"
    max_new_tokens: int = 2048
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.001
    importance_cap: float = 2.0
    skip_uniform_trees: bool = True
    uniform_in_denominator: bool = False


# --- advantages ---------------------------------------------------------------------------------


def spread(rewards: Sequence[float], std: str) -> float:
    count = len(rewards)
    divisor = count if std == "population" else count - 1
    if divisor == 0:
        return 0.0
    mean = math.fsum(rewards) / count
    return math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / divisor)


def uniform(tree: SlowTree) -> bool:
    return len({r.reward for r in tree.rollouts}) == 1


def advantage(tree: SlowTree, node: Path, s: Setting) -> float:
    """A(s) = A_GL(s) + lambda A_IB(s)."""
    if not node:
        return 0.0
    std = 0.0 if uniform(tree) else spread([r.reward for r in tree.rollouts], s.std)
    group = 0.0
    if std > 0:
        above_root = tree.value(node, s.value_estimator) - tree.value((), s.value_estimator)
        group = above_root / (std + s.advantage_eps)
    gain = tree.info_gain(node, s.value_estimator, s.beta, s.zero_value_ratio)
    local = gain * tree.confidence(node, s.confidence)
    if s.local_scale == "step":
        local /= len(node[-1])
    return group + s.local_weight * local


def seen_by(policy: Policy, tree: SlowTree, prompt: Tokens) -> SlowTree:
    """The tree with this policy's log-probabilities in the place of those recorded."""
    seen = SlowTree()
    for rollout in tree.rollouts:
        sofar = tuple(t for ids in rollout.start for t in ids)
        steps = []
        for ids, _, versions in rollout.steps:
            ends = range(len(sofar) + 1, len(sofar) + len(ids) + 1)
            sofar += ids
            steps.append(
                SlowStep(ids, tuple(policy(prompt, sofar[:end]) for end in ends), versions)
            )
        seen.insert(rollout.start, steps, rollout.reward, rollout.finish)
    return seen


# --- loss ---------------------------------------------------------------------------------------


def clipped_term(ratio: float, a: float, s: Setting) -> float:
    if ratio < 1 - s.clip_low:
        held = 1 - s.clip_low
    elif ratio > 1 + s.clip_high:
        held = 1 + s.clip_high
    else:
        held = ratio
    return min(ratio * a, held * a)


def k3(logp: float, ref_logp: float) -> float:
    return math.exp(ref_logp - logp) - (ref_logp - logp) - 1


def rollout_terms(
    tree: SlowTree,
    judged: SlowTree,
    rollout: Rollout,
    prompt: Tokens,
    s: Setting,
    policy: Policy,
    old_policy: Policy | None,
    reference: Policy | None,
) -> list[float]:
    """clipped - kl_weight KL of each token of one rollout; advantages are those of `judged`. With
    `old_policy` the ratio is against it, and the engine's recorded log-probabilities enter as
    truncated importance weight."""
    terms: list[float] = []
    tokens = rollout.tokens
    at = 0
    for depth in range(1, len(rollout.path) + 1):
        node = rollout.path[:depth]
        a = advantage(judged, node, s)
        for engine_logp in tree.step(node).logprobs:
            sofar = tokens[: at + 1]
            logp = policy(prompt, sofar)
            if old_policy is None:
                term = clipped_term(math.exp(logp - engine_logp), a, s)
            else:
                old_logp = old_policy(prompt, sofar)
                weight = min(math.exp(old_logp - engine_logp), s.importance_cap)
                term = weight * clipped_term(math.exp(logp - old_logp), a, s)
            if reference is not None:
                term -= s.kl_weight * k3(logp, reference(prompt, sofar))
            terms.append(term)
            at += 1
    return terms


def loss(
    trees: Sequence[SlowTree],
    prompt: Tokens,
    s: Setting,
    policy: Policy,
    old_policy: Policy | None = None,
    reference: Policy | None = None,
) -> float:
    """Loss of a batch of trees over one prompt, rollout by rollout (twins count twice)."""
    kept = [t for t in trees if not (s.skip_uniform_trees and uniform(t))]
    counted = list(trees) if s.uniform_in_denominator else kept
    total = 0.0
    for tree in kept:
        judged = tree
        if s.local_reference == "reference":
            assert reference is not None
            judged = seen_by(reference, tree, prompt)
        for rollout in tree.rollouts:
            # the leaf's weight, shared by the rollouts that end there
            weight = tree.trajectory_weight(rollout.path, s.trajectory_weight)
            weight /= tree.ends(rollout.path)
            terms = rollout_terms(tree, judged, rollout, prompt, s, policy, old_policy, reference)
            if s.length_norm == "trajectory":
                total += weight * math.fsum(terms) / len(terms) / len(counted)
            else:
                total += weight * len(tree.rollouts) * math.fsum(terms)
    if s.length_norm == "token":
        total /= math.fsum(_weighted_tokens(tree, s) for tree in counted)
    elif s.length_norm == "constant":
        total /= sum(len(tree.rollouts) for tree in counted) * s.max_new_tokens
    return -total


def _weighted_tokens(tree: SlowTree, s: Setting) -> float:
    """Generated tokens over all rollouts, a rollout weighted by G times its weight."""
    return math.fsum(
        tree.trajectory_weight(r.path, s.trajectory_weight)
        / tree.ends(r.path)
        * len(tree.rollouts)
        * len(r.tokens)
        for r in tree.rollouts
    )
