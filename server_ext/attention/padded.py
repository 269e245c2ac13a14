"""Attention over paged slots in torch alone, for machines without a C++ compiler.

Keys and values are gathered into padded tensors for many sequences at once and multiplied as
batches; there is no loop over sequences, only over parts that fit into memory.
"""

from __future__ import annotations

import numpy as np
import torch

from server_ext.attention.plan import OPEN, Plan, Queries

CHUNK_QUERIES = 64
"""Queries of a sequence in one padded row."""
PART_BYTES = 128 * 1024 * 1024
"""What the tensors of one part may take."""


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    table: torch.Tensor,
    plan: Plan,
    queries: Queries,
    scale: float,
    cap: float = 0.0,
    window: int = -1,
    slot_map: torch.Tensor | None = None,
) -> None:
    """As `paged.attend`, for any floating type and strides; of the plan it uses the open runs."""
    tails = plan.runs[plan.runs[:, 2] == OPEN]
    table_rows = np.empty(len(plan.order), np.int64)
    table_rows[tails[:, 3]] = tails[:, 0]

    counts = np.diff(queries.first).astype(np.int64)
    chunks = -(-counts // CHUNK_QUERIES)
    sequence = np.repeat(np.arange(len(counts)), chunks)
    number = np.arange(len(sequence)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
    begin = queries.first[sequence] + number * CHUNK_QUERIES
    width = np.minimum(CHUNK_QUERIES, queries.first[sequence + 1] - begin)
    keys = queries.position[begin + width - 1] + 1  # what its last query sees
    if not len(keys):
        return
    by_keys = np.argsort(keys, kind="stable")
    numbers = q.shape[1] * CHUNK_QUERIES + k.shape[1] * (k.shape[2] + v.shape[2])
    per_part = np.maximum(1, PART_BYTES // (4 * numbers * keys[by_keys]))
    at = 0
    while at < len(by_keys):
        fits = np.arange(1, len(by_keys) - at + 1) <= per_part[at:]
        size = len(fits) if fits.all() else max(1, int(fits.argmin()))
        part = by_keys[at : at + size]
        _attend_part(
            q, k, v, out, table, scale, cap, window, slot_map, queries,
            table_rows[sequence[part]], begin[part], width[part], int(keys[part].max()),
        )  # fmt: skip
        at += size


def _attend_part(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    table: torch.Tensor,
    scale: float,
    cap: float,
    window: int,
    slot_map: torch.Tensor | None,
    queries: Queries,
    table_rows: np.ndarray,
    begin: np.ndarray,
    width: np.ndarray,
    keys: int,
) -> None:
    group = q.shape[1] // k.shape[1]
    within = np.arange(int(width.max()))
    real = within < width[:, None]
    index = np.minimum(begin[:, None] + within, begin[:, None] + width[:, None] - 1)
    token = torch.from_numpy(queries.token[index])
    position = torch.from_numpy(queries.position[index])

    slots = table[torch.from_numpy(table_rows), :keys].long()
    seen = torch.arange(keys) <= position.max(dim=1, keepdim=True).values
    slots = torch.where(seen, slots, slots[:, :1])  # beyond a sequence's end a row is not its own
    if slot_map is not None:
        slots = slot_map[slots].clamp_min(0)
    k_, v_ = k[slots].float(), v[slots].float()  # [rows, keys, KV heads, dim]
    q_ = q[token].float().reshape(*token.shape, k.shape[1], group, -1)
    scores = torch.einsum("bqhgd,bkhd->bhgqk", q_, k_) * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    hidden = torch.arange(keys) > position[..., None]
    if window >= 0:
        hidden |= torch.arange(keys) < position[..., None] - window
    weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
    found = torch.einsum("bhgqk,bkhd->bqhgd", weights, v_).flatten(2, 3)
    kept = torch.from_numpy(real)
    out[token[kept]] = found[kept].to(out.dtype)
