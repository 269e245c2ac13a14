"""What of a tree enters the loss: its steps' advantages and its trajectories' weights.

Shapes: N nodes of a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ibtree.tree import Floats, Tree, score
from learner.algo.advantage import NO_SPREAD, step_advantages
from learner.algo.objectives import tree_shares
from learner.config import LearnerConfig


@dataclass(frozen=True)
class TrainedTree:
    """A tree that enters the loss."""

    tree: Tree
    share_N: Floats
    """As in Shares."""
    scale: float
    """What they are multiplied by in this batch."""
    first: int
    """The number of its first node when the nodes of all trees of the batch are counted through."""


def is_uniform(tree: Tree) -> bool:
    """True if all trajectories have one reward: nothing to compare."""
    return bool(np.ptp(tree.rewards()) <= NO_SPREAD)


def tree_advantages(
    tree: Tree, config: LearnerConfig, reference_logp_N: Tensor | None = None
) -> Tensor:
    """A(s) of each node, float64, [N] (algorithm in learner/algo/advantage.py). The confidence in a
    step is the behaviour policy's, or the reference's where its log-probabilities are given."""
    options = tree.options
    value = score.values(tree, config.value_estimator)
    gain = score.info_gains(tree, value, config.beta, options.zero_value_ratio)
    logprobs = None if reference_logp_N is None else reference_logp_N.numpy()
    confidence = score.confidences(tree, config.confidence, logprobs)
    lengths = torch.tensor([len(step.token_ids) for step in tree.steps], dtype=torch.float64)
    return step_advantages(
        torch.from_numpy(value),
        torch.from_numpy(gain),
        torch.from_numpy(confidence),
        torch.from_numpy(tree.rewards()),
        local_weight=config.local_weight,
        std=config.std,
        eps=config.advantage_eps,
        length_N=lengths if config.local_scale == "step" else None,
    )


class Shares(NamedTuple):
    """What each token of a trajectory that ends at a node counts in the loss, [N] (0 where none
    ends), before the division by the sum of `whole` over the batch; `uniform` as is_uniform."""

    share_N: Floats
    whole: float
    uniform: bool


def shares_of(tree: Tree, config: LearnerConfig) -> Shares:
    """In one pass over the nodes: paths share most of their steps."""
    depth_N = np.zeros(len(tree), np.int64)
    for node in tree.topological():
        depth_N[node] = depth_N[tree.parents[node]] + len(tree.steps[node].token_ids)
    ends = tree.end_nodes()
    its = tree_shares(
        depth_N[ends],
        score.trajectory_weights(tree, config.trajectory_weight)[ends],
        tree.trajectories,
        length_norm=config.length_norm,
        constant_tokens=config.max_new_tokens,
    )
    share_N = np.zeros(len(tree))
    share_N[ends] = its.share_B
    return Shares(share_N, its.whole, is_uniform(tree))


def trained_trees(
    trees: Sequence[Tree], config: LearnerConfig, shares: Callable[[Tree], Shares] | None = None
) -> list[TrainedTree]:
    """The trees to train on; `shares` may know what shares_of would find.

    Uniform trees are left out if they are to be skipped; with `uniform_in_denominator` they
    still count where the loss is normalised, whatever the normalisation.
    """
    found = [(tree, shares_of(tree, config) if shares is None else shares(tree)) for tree in trees]
    kept = [(t, its) for t, its in found if not (config.skip_uniform_trees and its.uniform)]
    counted = found if config.uniform_in_denominator else kept
    scale = 1.0 / max(sum(its.whole for _, its in counted), 1.0)
    firsts = accumulate((len(tree) for tree, _ in kept), initial=0)
    return [
        TrainedTree(tree, its.share_N, scale, first)
        for (tree, its), first in zip(kept, firsts, strict=False)
    ]
