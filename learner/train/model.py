"""The policy: a Hugging Face causal language model, and its log-probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ibtpo_torchvision
from ibtree.errors import FieldError
from ibtree.weights.model_folder import INDEX, stored_dtype, weight_files
from learner.algo.logprobs import chunked_logprobs
from learner.tree.attention import TreeAttention, hidden_states
from learner.tree.pack import Pack


def mend_torchvision() -> None:
    """Lets transformers be imported beside a torchvision that is built for another torch."""
    ibtpo_torchvision.install()


def load_policy(folder: Path, device: torch.device, dtype: str) -> Any:
    """The model in training mode without dropout. Raises FieldError if it does not load."""
    mend_torchvision()
    from transformers import AutoConfig, AutoModelForCausalLM

    files = weight_files(folder)
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        # or a file beside an index would be preferred to it
        config.transformers_weights = INDEX if (folder / INDEX).is_file() else files[0].name
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), config=config, dtype=getattr(torch, dtype), local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise FieldError("model", f"{folder} does not load: {error}", "a HF folder") from error
    del model.config.transformers_weights  # it says nothing about where this one is saved
    model.tie_weights()  # of a head beside tied embeddings, which the server does not read either
    return model.to(device).eval()  # eval: dropout would move log-probabilities off the engine's


def vocabulary_of(model: Any) -> int:
    """How many token ids the model knows; configurations have it in different places."""
    return int(model.get_input_embeddings().weight.shape[0])


def compute_dtype_of(folder: Path) -> str:
    """The dtype that a model folder is computed in: float32 if it holds that, else bfloat16.
    Raises FieldError."""
    return "float32" if stored_dtype(folder) == "F32" else "bfloat16"


def checkpoint_activations(model: Any) -> None:
    """Keeps the inputs of the layers only and computes the rest again in the backward pass."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # it asks for this; what is inside stays in eval mode


def token_logprobs(
    model: Any,
    ids_BS: Tensor,
    mask_BS: Tensor,
    prompt: Tensor,
    width: int,
    *,
    temperature: float,
    chunk: int = 1024,
) -> Tensor:
    """ln softmax(logits / temperature) of each generated token, float32, [B, width].

    `ids_BS`: prompt and completion, padded on the right; `mask_BS`: 1 at real tokens; `prompt`:
    the rows' prompt lengths, [B]. Entry t of row b belongs to token prompt[b] + t, whose
    distribution the model gives one position earlier; entries past the row's end are 0. Only
    `chunk` tokens' logits are in float32 at a time.
    """
    logits_BSV = model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False).logits
    index_BT = prompt[:, None] + torch.arange(width, device=ids_BS.device)[None, :]
    inside_BT = index_BT < mask_BS.sum(1, keepdim=True)
    row, column = torch.nonzero(inside_BT, as_tuple=True)
    at = index_BT[row, column]
    logp = chunked_logprobs(
        lambda logits: logits,
        logits_BSV.flatten(0, 1).index_select(0, row * ids_BS.shape[1] + at - 1),
        ids_BS[row, at],
        temperature=temperature,
        chunk=chunk,
    )
    return torch.zeros_like(inside_BT, dtype=logp.dtype).index_put((row, column), logp)


def packed_logprobs(
    model: Any, pack: Pack, attention: TreeAttention, *, temperature: float, chunk: int
) -> Tensor:
    """ln softmax(logits / temperature) of each token with a term in the loss, float32, [T].

    Read at its predecessor in the tree. Logits exist for `chunk` tokens at a time.
    """
    hidden_MD = hidden_states(model, pack.ids, pack.position, attention)
    return chunked_logprobs(
        model.get_output_embeddings(),
        hidden_MD.index_select(0, pack.predecessor[pack.target]),
        pack.ids[pack.target],
        temperature=temperature,
        chunk=chunk,
    )
