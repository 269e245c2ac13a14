"""Precision of the passes: weights, gradients and optimiser are float32, and forward and backward
passes compute with copies of the weights in `compute_dtype`.

Under torchrun FSDP makes the copies (learner/dist/fsdp.py); without it `computing_in` does the
same. torch.autocast would not: it leaves norms and embeddings in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from learner.config import LearnerConfig


def compute_dtype(config: LearnerConfig) -> torch.dtype | None:
    """What `compute_dtype` names; None leaves it to the weights."""
    return None if config.compute_dtype is None else getattr(torch, config.compute_dtype)


@contextmanager
def computing_in(dtype: torch.dtype | None, model: Any) -> Iterator[None]:
    """Inside, the model's modules hold copies of its weights in `dtype`, as they are at the start.
    Each backward pass adds its gradient to the weights' own, in their precision.

    A backward pass has to end inside, too: it may compute activations again. Nothing if `dtype` is
    None.
    """
    if dtype is None:
        yield
        return
    holders = [
        (module, name, weight)
        for module in model.modules()
        for name, weight in module.named_parameters(recurse=False)
        if weight.dtype != dtype
    ]
    copies = {weight: _copy(weight, dtype) for _, _, weight in holders}  # a tied weight has one
    try:
        for module, name, weight in holders:
            setattr(module, name, copies[weight])
        yield
    finally:
        for module, name, weight in holders:
            setattr(module, name, weight)


def _copy(weight: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    copy = nn.Parameter(weight.detach().to(dtype), weight.requires_grad)
    if weight.requires_grad:
        hand_on = partial(_hand_on, weight)
        copy.register_post_accumulate_grad_hook(hand_on)  # type: ignore[no-untyped-call]
    return copy


def _hand_on(weight: nn.Parameter, copy: Tensor) -> None:
    """Moves a pass's gradient from the copy to the weight, where those of all passes add up."""
    gradient, copy.grad = copy.grad, None
    assert gradient is not None
    if weight.grad is None:
        weight.grad = gradient.to(weight.dtype)
    else:
        weight.grad += gradient
