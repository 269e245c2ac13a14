"""A_IB by the frozen reference's confidence in each step instead of the behaviour policy's.

Shapes: N nodes of all trees of a batch, counted through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from learner.config import LearnerConfig
from learner.train.forward import Batch
from learner.tree.training import TrainingTree, tree_advantages


def step_logprobs(batches: Sequence[Batch], logps: Sequence[Tensor], nodes: int) -> Tensor:
    """Sum of the tokens' log-probabilities of each step, float64, [N]; 0 of those not there."""
    total_N = torch.zeros(nodes, dtype=torch.float64)
    for batch, logp in zip(batches, logps, strict=True):
        once = (logp * batch.counted).double().cpu()
        total_N.index_add_(0, batch.node.flatten().cpu(), once.flatten())
    return total_N


def by_reference(
    batches: Sequence[Any],
    logps: Sequence[Tensor],
    trees: Sequence[TrainingTree],
    config: LearnerConfig,
) -> list[Any]:
    """The batches of these trees with the advantages that the reference's `logps` make."""
    if not batches:
        return []
    nodes = max(training_tree.first + len(training_tree.tree) for training_tree in trees)
    logp_N, advantage_N = step_logprobs(batches, logps, nodes), torch.zeros(nodes).double()
    for training_tree in trees:
        own = slice(training_tree.first, training_tree.first + len(training_tree.tree))
        advantage_N[own] = tree_advantages(training_tree.tree, config, logp_N[own])
    return [
        replace(batch, advantage=advantage_N.to(batch.node.device)[batch.node]) for batch in batches
    ]
