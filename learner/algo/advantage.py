"""Step advantages of IB-TPO. Shapes: N nodes of a tree (node 0 is the root), G trajectories."""

from __future__ import annotations

import torch
from torch import Tensor

NO_SPREAD = 1e-9
"""Rewards whose std is below this are equal; sums of equal fractions differ in the last bits."""


def reward_std(rewards_G: Tensor, std: str) -> Tensor:
    """Spread of the trajectories' rewards, a scalar: `population` (divides by G) or `sample`
    (by G - 1; 0 for G = 1)."""
    correction = {"population": 0, "sample": 1}[std]
    if rewards_G.numel() <= correction:
        return rewards_G.new_zeros(())
    return rewards_G.std(correction=correction)


def step_advantages(
    value_N: Tensor,
    info_gain_N: Tensor,
    confidence_N: Tensor,
    rewards_G: Tensor,
    *,
    local_weight: float,
    std: str = "population",
    eps: float = 0.0,
    length_N: Tensor | None = None,
) -> Tensor:
    """A(s) = A_GL(s) + lambda A_IB(s) of each node, [N]; 0 for the root.

    A_GL(s) = (value(s) - value(root)) / (std({R}) + eps), 0 where the std is 0;
    A_IB(s) = info_gain(s) confidence(s), divided by the step's length [tokens] if `length_N` is
    given (`local_scale: step`). Source: arXiv 2605.28109, section 4 (advantage); with single-step
    trajectories, lambda 0, `sample` and eps 1e-4 it is TRL's GRPO advantage.
    """
    spread = reward_std(rewards_G, std)
    group_N = torch.zeros_like(value_N)
    if spread > NO_SPREAD:
        group_N = (value_N - value_N[0]) / (spread + eps)
    local_N = info_gain_N * confidence_N
    if length_N is not None:
        local_N = local_N / length_N.clamp(min=1)
    advantage_N = group_N + local_weight * local_N
    advantage_N[0] = 0.0
    return advantage_N
