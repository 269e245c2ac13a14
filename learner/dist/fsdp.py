"""FSDP2: each rank holds a part of every weight and has a whole layer only while it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from learner.dist.process_group import Ranks


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, of which the ranks may hold parts."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(model: Any, ranks: Ranks, compute: torch.dtype | None, *, trained: bool) -> None:
    """Spreads the model over the ranks, layer by layer, and moves it to their devices; passes
    `compute` in this dtype (None: the weights'), gradients are summed in float32. Nothing without a
    process group."""
    if ranks.mesh is None:
        return
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in [m for m in model.modules() if type(m).__name__ in layers]:
        fully_shard(module, mesh=ranks.mesh, mp_policy=precision)
    # the trained model's head and embedding stay between its forward and its backward pass
    after = None if trained else True
    fully_shard(model, mesh=ranks.mesh, mp_policy=precision, reshard_after_forward=after)
    if hasattr(model, "packed_logprobs"):
        register_fsdp_forward_method(model, "packed_logprobs")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no mean
            module.set_gradient_divide_factor(1.0)
