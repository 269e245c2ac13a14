"""Attention to a token's ancestors, under transformers' attention interface.

Shapes: H query heads, J key heads, M tokens of a pack, D features of a head.
The model hands the pack's attention object on: `model(..., tree=TreeAttention)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from ibtree.errors import FieldError
from learner.tree.ancestors import groups, rows_of, visible, visible_blocks

NAME = "ibtpo_tree"
BLOCK = 128
"""FlexAttention's default block of queries and of keys [tokens]."""
COMPILATIONS = 64
"""Most buckets of lengths times kinds of calls; torch gives up compiling at 8."""
_FOREIGN = {
    "sliding_window": "its attention has a sliding window",
    "softcap": "its attention scores are capped",
    "s_aux": "its attention has sinks",
}


class TreeAttention(Protocol):
    """Attention of one pack."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[1, H, M, D], [1, J, M, D] and [1, J, M, D] -> [1, M, H, D]."""
        ...


class SegmentAttention:
    """SDPA over each segment's new tokens against its path: no M x M mask, for the CPU."""

    def __init__(self, predecessor_M: Tensor, position_M: Tensor) -> None:
        self._groups = groups(predecessor_M, position_M)
        self._query = torch.cat([group.query_BQ.flatten() for group in self._groups])
        self._key = torch.cat([group.key_BK.flatten() for group in self._groups])
        self._row = rows_of(self._query, len(predecessor_M))
        self._bias: list[Tensor] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        bias = self._biases(query.dtype, query.device)
        queries = _gather(query, self._query, [group.query_BQ.shape for group in self._groups])
        of_keys = [group.key_BK.shape for group in self._groups]
        keys, values = (_gather(x, self._key, of_keys) for x in (key, value))
        outs = [
            scaled_dot_product_attention(q, k, v, attn_mask=b, scale=scale, enable_gqa=True)
            for q, k, v, b in zip(queries, keys, values, bias, strict=True)
        ]
        out = torch.cat([o.transpose(1, 2).flatten(0, 1) for o in outs])
        return out.index_select(0, self._row.to(out.device))[None]

    def _biases(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """0 or -inf, made once: each layer keeps what it is given until the backward pass."""
        if not self._bias or self._bias[0].dtype != dtype:
            hidden = torch.tensor(float("-inf"), dtype=dtype)
            self._bias = [
                torch.where(group.visible_BQK, 0.0, hidden).to(device)[:, None]
                for group in self._groups
            ]
        return self._bias


def _gather(x: Tensor, index: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """[1, H, M, D] -> of each group [B, H, n, D], all groups' [B, n] flattened in `index`."""
    rows = x[0].transpose(0, 1).index_select(0, index.to(x.device))
    parts = torch.split(rows, [shape.numel() for shape in shapes])
    return [
        part.view(*shape, *part.shape[1:]).transpose(1, 2)
        for part, shape in zip(parts, shapes, strict=True)
    ]


class FlexTreeAttention:
    """FlexAttention with a block mask, for the GPU; M is a multiple of 128 [tokens].

    `kernel` is called as flex_attention; the default is compiled once for each M.
    """

    def __init__(self, last_M: Tensor, kernel: Callable[..., Tensor] | None = None) -> None:
        self._kernel = kernel or _compiled()
        self._mask = block_mask(last_M)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        heads = query.shape[1]
        if heads & (heads - 1):  # its kernels share key heads among powers of two only
            key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
        out = self._kernel(
            query, key, value, block_mask=self._mask, scale=scale,
            enable_gqa=key.shape[1] != heads,
        )  # fmt: skip
        return out.transpose(1, 2).contiguous()


def block_mask(last_M: Tensor) -> BlockMask:
    """Which blocks FlexAttention visits, from the intervals alone (no M x M mask)."""

    def ancestor(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(last_M, query, key)

    some, every = visible_blocks(last_M, BLOCK)
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~every),
        *_ordered(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=ancestor,
        seq_lengths=(len(last_M), len(last_M)),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each row are set, [1, 1, n], and which, those first, [1, 1, n, n]."""
    count = blocks.sum(1, dtype=torch.int32)
    which = torch.argsort(blocks.int(), dim=1, descending=True, stable=True).int()
    return count[None, None], which[None, None].contiguous()


@cache
def _compiled() -> Callable[..., Tensor]:
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, COMPILATIONS)
    return torch.compile(flex_attention, dynamic=False)


def install(model: Any) -> None:
    """The model's attention goes through the pack's TreeAttention from now on.

    Raises FieldError if its attention is not that of transformers' interface.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)
    try:
        model.set_attn_implementation(NAME)
    except ValueError as error:
        raise unfit(f"{type(model).__name__}: {error}") from error
    if not installed(model):
        raise unfit(f"{type(model).__name__} does not use transformers' attention interface")


def installed(model: Any) -> bool:
    """True if the model's attention goes through TreeAttention."""
    return bool(model.config._attn_implementation == NAME)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    tree: TreeAttention,
    **others: Any,
) -> tuple[Tensor, None]:
    for name, problem in _FOREIGN.items():
        if others.get(name) is not None:
            raise unfit(problem)
    return tree.attend(query, key, value, scaling), None


def hidden_states(
    model: Any, ids_M: Tensor, position_M: Tensor, attention: TreeAttention
) -> Tensor:
    """What the head sees of each token of a packed sequence, [M, D]."""
    out = model.get_decoder()(
        input_ids=ids_M[None], position_ids=position_M[None], use_cache=False, tree=attention
    )
    hidden_1MD: Tensor = out.last_hidden_state
    return hidden_1MD[0]


def unfit(reason: str) -> FieldError:
    """The refusal of a model."""
    return FieldError("forward", f"packed does not work with this model: {reason}", "trajectory")
