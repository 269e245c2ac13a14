"""bfloat16 weights stand still at RL's learning rates, so they are refused; float32 ones move."""

from __future__ import annotations

import pytest
import torch

from ibtree.errors import FieldError
from learner.dist.process_group import ALONE
from learner.run import new_trainer
from tests.learner.tiny import config


def moved(dtype: torch.dtype, lr: float) -> float:
    """Fraction of typical weights that differ after 200 steps of AdamW."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(0.02 * torch.randn(20_000, generator=generator).to(dtype))
    before, optimizer = (
        weights.detach().clone(),
        torch.optim.AdamW([weights], lr=lr, weight_decay=0),
    )
    for _ in range(200):
        weights.grad = torch.randn(20_000, generator=generator).to(dtype)
        optimizer.step()
    return float((weights.detach() != before).float().mean())


def test_why_they_are_refused():
    assert moved(torch.bfloat16, 1e-6) < 0.1
    assert moved(torch.float32, 1e-6) > 0.99


def test_bfloat16_weights_are_refused_with_the_remedy():
    with pytest.raises(FieldError, match=r"dtype: bfloat16 .* lr 1e-06.*--compute-dtype bfloat16"):
        new_trainer(config(dtype="bfloat16", lr=1e-6), ALONE)
