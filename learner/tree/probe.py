"""Whether a model can run on packed trees, found out by running it on one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ibtree.errors import FieldError
from learner.tree.attention import SegmentAttention, hidden_states, install, installed, unfit
from learner.tree.layout import layout

PROMPT, BRANCH = 3, 4
"""Tokens of the tree it is tried on: a prompt and two branches."""


class _Counted(SegmentAttention):
    """Counts the attention layers that come through it."""

    calls = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.calls += 1
        return super().attend(query, key, value, scale)


def enable_packed_attention(model: Any) -> None:
    """Switches the model's attention to packed trees; a second time does nothing.

    Raises FieldError, with the reason, and leaves the model as it was, if it reads more than a
    token's ancestors or its logits are not those of its trajectories: sliding windows, state
    space, attention or a head of another kind.
    """
    if installed(model):
        return
    before = model.config._attn_implementation
    try:
        _try_out(model)
    except FieldError:
        if installed(model):
            model.set_attn_implementation(before)
        raise


@torch.no_grad()
def _try_out(model: Any) -> None:
    size = model.get_input_embeddings().weight.shape[0]
    tree_layout = layout([0, 0, 0], [PROMPT, BRANCH, BRANCH])
    predecessor, position = map(torch.from_numpy, (tree_layout.predecessor, tree_layout.position))
    attention = _Counted(predecessor, position)
    ids = (torch.arange(len(position)) * 7 % size).to(model.device)
    position = position.to(model.device)
    rows = torch.stack([ids[: PROMPT + BRANCH], torch.cat([ids[:PROMPT], ids[-BRANCH:]])])
    row_logits = model(input_ids=rows, use_cache=False).logits
    install(model)
    try:
        hidden = hidden_states(model, ids, position, attention)
        packed_logits = model.get_output_embeddings()(hidden)
    except TypeError as error:
        raise unfit(f"it does not hand arguments on to its attention ({error})") from error
    layers = model.config.get_text_config().num_hidden_layers
    if attention.calls != layers:
        raise unfit(f"{layers - attention.calls} of its {layers} layers are no attention to tokens")
    row_logits = torch.cat([row_logits[0], row_logits[1, PROMPT:]])
    tolerance = torch.finfo(row_logits.dtype).eps ** 0.5
    if (packed_logits - row_logits).norm() > tolerance * row_logits.norm():
        raise unfit("its log-probabilities differ from those of single trajectories")
