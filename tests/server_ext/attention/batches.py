"""Random batches over paged slots, and attention as the formula says, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Shape:
    """`group`: query heads per KV head."""

    kv_heads: int = 2
    group: int = 7
    dim: int = 64
    v_dim: int = 64
    dtype: torch.dtype = torch.float32
    scale: float = 0.125
    cap: float = 0.0
    window: int = -1


@dataclass
class Batch:
    """Sequences in rows of a slot table, and what a layer has of them."""

    shape: Shape
    table: torch.Tensor
    rows: np.ndarray
    lengths: np.ndarray
    new: np.ndarray
    k: torch.Tensor
    v: torch.Tensor
    q: torch.Tensor

    def reference(self) -> torch.Tensor:
        """[tokens, query heads, v_dim] float64."""
        shape, outs, at = self.shape, [], 0
        for row, length, new in zip(self.rows, self.lengths, self.new, strict=True):
            slots = self.table[row, :length].long()
            k = self.k[slots].double().repeat_interleave(shape.group, 1)
            v = self.v[slots].double().repeat_interleave(shape.group, 1)
            scores = torch.einsum("qhd,khd->hqk", self.q[at : at + new].double(), k) * shape.scale
            if shape.cap:
                scores = shape.cap * torch.tanh(scores / shape.cap)
            position, key = torch.arange(length - new, length)[:, None], torch.arange(length)
            seen = key <= position
            if shape.window >= 0:
                seen &= key >= position - shape.window
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            outs.append(torch.einsum("hqk,khd->qhd", weights, v))
            at += new
        return torch.cat(outs)

    def grow(self, rng: np.random.Generator) -> None:
        """One more token each, and the queries of that step."""
        slots = rng.choice(len(self.k), len(self.rows), replace=False)
        self.table[self.rows, self.lengths] = torch.from_numpy(slots.astype(np.int32))
        self.lengths, self.new = self.lengths + 1, np.ones_like(self.new)
        self.q = torch.randn(len(self.rows), *self.q.shape[1:]).to(self.q.dtype)


def batch(
    rng: np.random.Generator,
    shape: Shape,
    sequences: int,
    longest: int,
    mode: str = "decode",
    page: int = 1,
    shared: float = 0.7,
    room: int = 8,
) -> Batch:
    """`mode`: decode (one query a sequence), extend (up to all its tokens) or mixed (mostly one).
    With the probability `shared` a sequence begins as an earlier one, up to any depth; now and then
    it is all of that one, or goes on where it ends. Slots come in whole pages, anywhere."""
    torch.manual_seed(int(rng.integers(2**31)))
    lengths = rng.integers(1, longest + 1, sequences)
    pages = -(-(longest + room) // page)
    tables = np.zeros((sequences, pages * page), np.int32)
    pool = (max(1, -(-int(lengths.sum()) // page)) + 1) * page * 2
    for i, length in enumerate(lengths):
        first = rng.integers(0, pool // page, pages)
        tables[i] = (first[:, None] * page + np.arange(page)).ravel()
        if i and rng.random() < shared:
            other = int(rng.integers(i))
            most = min(length, lengths[other])
            common = most if rng.random() < 0.3 else int(rng.integers(0, most + 1))
            tables[i, :common] = tables[other, :common]
    rows = rng.permutation(sequences + 3)[:sequences].astype(np.int64)
    table = torch.zeros(sequences + 3, tables.shape[1] + 5, dtype=torch.int32)
    table[rows, : tables.shape[1]] = torch.from_numpy(tables)
    new = np.ones(sequences, np.int64)
    if mode != "decode":
        extends = rng.random(sequences) < (1.0 if mode == "extend" else 0.2)
        new = np.where(extends, rng.integers(1, lengths + 1), 1)
    heads = shape.kv_heads * shape.group
    return Batch(
        shape, table, rows, lengths, new,
        torch.randn(pool, shape.kv_heads, shape.dim).to(shape.dtype),
        torch.randn(pool, shape.kv_heads, shape.v_dim).to(shape.dtype),
        torch.randn(int(new.sum()), heads, shape.dim).to(shape.dtype),
    )  # fmt: skip
