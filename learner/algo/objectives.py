"""The IB-TPO loss per token; the same terms for rows of trajectories and for packed trees.

Shapes: B distinct trajectories of a tree; tokens in any shape, [B, T] of rows or [T] of a pack.
Source: arXiv 2605.28109 (objective, GRPO form); k3 from http://joschu.net/blog/kl-approx.html;
`token` is DAPO (arXiv 2503.14476), `constant` Dr. GRPO (arXiv 2503.20783).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from learner.algo import Floats, Ints


class Objective(NamedTuple):
    """Per-token terms, of one shape: the clipped surrogate, the KL estimate, 1 where clipped."""

    surrogate: Tensor
    kl: Tensor
    clipped: Tensor


def token_objective(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    ref_logp: Tensor | None = None,
    correction: Tensor | None = None,
) -> Objective:
    """min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), ratio = exp(logp - old_logp).

    All arguments have one shape. `correction` (truncated importance sampling) multiplies the
    surrogate; KL is k3 against `ref_logp`, zeros without it.
    """
    ratio = torch.exp(logp - old_logp)
    clipped = torch.clamp(ratio, 1.0 - clip_low, 1.0 + clip_high)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    was_clipped = (clipped * advantage < ratio * advantage).to(logp.dtype)
    if correction is not None:
        surrogate = surrogate * correction
    kl = torch.zeros_like(logp)
    if ref_logp is not None:
        gap = ref_logp - logp
        kl = torch.exp(gap) - gap - 1.0
    return Objective(surrogate, kl, was_clipped)


def truncated_importance(trainer_old_logp: Tensor, engine_logp: Tensor, cap: float) -> Tensor:
    """min(exp(logpi_trainer,old - logpi_engine), cap), without gradient."""
    return torch.exp(trainer_old_logp - engine_logp).clamp(max=cap).detach()


class TokenWeights(NamedTuple):
    """What each token of a tree's trajectories counts in the loss, [B], before the division by the
    sum of `normalizer` over the batch's trees."""

    weight_B: Floats
    normalizer: float


def token_weights(
    length_B: Ints,
    trajectory_weight_B: Floats,
    trajectories: int,
    *,
    length_norm: str,
    constant_tokens: int = 1,
) -> TokenWeights:
    """`length_B`: generated tokens of a trajectory; `trajectory_weight_B`: its weight in the tree
    (they sum to 1; the paper: 1 / G); `trajectories`: G.

    What comes of it in a batch: `trajectory`: weight / |tau| / trees. `token`: weight G / sum of
    all weight G |tau|. `constant`: weight G / (number of all trajectories * constant_tokens).
    """
    count_B = trajectory_weight_B * trajectories
    if length_norm == "trajectory":
        return TokenWeights(trajectory_weight_B / np.maximum(length_B, 1), 1.0)
    if length_norm == "token":
        return TokenWeights(count_B, float(count_B @ length_B))
    if length_norm == "constant":
        return TokenWeights(count_B, float(count_B.sum()) * constant_tokens)
    raise ValueError(f"length_norm {length_norm!r}: trajectory | token | constant")


def weighted_loss(objective: Objective, weight: Tensor, kl_weight: float) -> Tensor:
    """L = - sum_t w_t [surrogate_t - kl_weight KL_t], a scalar."""
    return -(weight * (objective.surrogate - kl_weight * objective.kl)).sum()
