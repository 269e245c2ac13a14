"""The policy: a Hugging Face causal language model, and its log-probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibtree.errors import FieldError


def mend_torchvision() -> None:
    """A CUDA torchvision beside a CPU torch lacks this operator, and transformers imports it."""
    if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
        torch.library.define(
            "torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one. Raises FieldError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise FieldError("device", "cuda is not available here", "auto | cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def load_policy(folder: Path, device: torch.device, dtype: str) -> Any:
    """The model in training mode without dropout. Raises FieldError if it does not load."""
    mend_torchvision()
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=getattr(torch, dtype), local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise FieldError("model", f"{folder} does not load: {error}", "a HF folder") from error
    return model.to(device).eval()  # eval: dropout would move log-probabilities off the engine's


def token_logprobs(
    model: Any, ids_BS: Tensor, mask_BS: Tensor, prompt: Tensor, width: int, temperature: float
) -> Tensor:
    """ln softmax(logits / temperature) of each generated token, float32, [B, width].

    `ids_BS`: prompt and completion, padded on the right; `mask_BS`: 1 at real tokens; `prompt`:
    the rows' prompt lengths, [B]. Entry t of row b belongs to token prompt[b] + t, whose
    distribution the model gives one position earlier; entries past the row's end are 0.
    """
    logits_BSV = model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False).logits
    index_BT = prompt[:, None] + torch.arange(width, device=ids_BS.device)[None, :]
    inside_BT = index_BT < mask_BS.sum(1, keepdim=True)
    index_BT = torch.where(inside_BT, index_BT, 1)
    at_BTV = torch.gather(
        logits_BSV, 1, (index_BT - 1)[..., None].expand(-1, -1, logits_BSV.shape[-1])
    )
    logp_BTV = torch.log_softmax(at_BTV.float() / temperature, dim=-1)
    target_BT = torch.gather(ids_BS, 1, index_BT)
    logp_BT = torch.gather(logp_BTV, 2, target_BT[..., None]).squeeze(-1)
    return torch.where(inside_BT, logp_BT, 0.0)
