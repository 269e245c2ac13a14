"""What of a tree enters the loss: its steps' advantages and its trajectories' weights.

Shapes: N nodes of a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ibtree.tree import Floats, Tree, score
from learner.algo.advantage import NO_SPREAD, step_advantages
from learner.algo.objectives import token_weights
from learner.config import LearnerConfig


@dataclass(frozen=True)
class TrainingTree:
    """A tree to be trained: it enters the batch's loss."""

    tree: Tree
    weight_N: Floats
    """The weights as in LossWeights."""
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


class LossWeights(NamedTuple):
    """What each token of a trajectory that ends at a node counts in the loss, [N] (0 where none
    ends), before the division by the sum of `normalizer` over the batch; `uniform` as
    is_uniform."""

    weight_N: Floats
    normalizer: float
    uniform: bool


def loss_weights_of(tree: Tree, config: LearnerConfig) -> LossWeights:
    """The tree's loss weights, in one pass over the nodes: paths have most steps in common."""
    depth_N = np.zeros(len(tree), np.int64)
    for node in tree.topological():
        depth_N[node] = depth_N[tree.parents[node]] + len(tree.steps[node].token_ids)
    ends = tree.end_nodes()
    per_token = token_weights(
        depth_N[ends],
        score.trajectory_weights(tree, config.trajectory_weight)[ends],
        tree.trajectories,
        length_norm=config.length_norm,
        constant_tokens=config.max_new_tokens,
    )
    weight_N = np.zeros(len(tree))
    weight_N[ends] = per_token.weight_B
    return LossWeights(weight_N, per_token.normalizer, is_uniform(tree))


def training_trees(
    trees: Sequence[Tree],
    config: LearnerConfig,
    loss_weights: Callable[[Tree], LossWeights] | None = None,
) -> list[TrainingTree]:
    """The trees to train on; `loss_weights` may know what loss_weights_of would compute.

    Uniform trees are left out if they are to be skipped; with `uniform_in_denominator` they
    still count where the loss is normalised, whatever the normalisation.
    """
    weights_of = partial(loss_weights_of, config=config) if loss_weights is None else loss_weights
    weighted = [(tree, weights_of(tree)) for tree in trees]
    trained_on = [
        (tree, weights)
        for tree, weights in weighted
        if not (config.skip_uniform_trees and weights.uniform)
    ]
    counted = weighted if config.uniform_in_denominator else trained_on
    scale = 1.0 / max(sum(weights.normalizer for _, weights in counted), 1.0)
    firsts = accumulate((len(tree) for tree, _ in trained_on), initial=0)
    return [
        TrainingTree(tree, weights.weight_N, scale, first)
        for (tree, weights), first in zip(trained_on, firsts, strict=False)
    ]
