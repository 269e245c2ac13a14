"""Attention to ancestors only, without an M x M mask: segments for SDPA, blocks for FlexAttention.

Shapes: M tokens in depth-first order; G groups of B segments with Q new tokens and K tokens of
their paths, padded; n blocks of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LONGEST = 128
"""Most new tokens of a segment: of the scores among them nearly half are masked out."""
WASTE = 1.1
"""A group may compute this many times the scores it needs: padding against calls."""


class Group(NamedTuple):
    """Segments that attend in one call; padding repeats a segment's first token."""

    query_BQ: Tensor
    key_BK: Tensor
    visible_BQK: Tensor


def visible(last_M: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """True where the token `key` is `query` or above it (indices that broadcast)."""
    return (key <= query) & (query <= last_M[key])


def segments(predecessor_M: Tensor, longest: int = LONGEST) -> list[range]:
    """Runs of tokens that follow each other in the tree: each rollout's new tokens, in stretches
    of at most `longest`."""
    index = torch.arange(len(predecessor_M))
    starts = index[(predecessor_M != index - 1) | (predecessor_M < 0)].tolist()
    return [
        range(a, min(a + longest, stop))
        for start, stop in zip(starts, [*starts[1:], len(predecessor_M)], strict=True)
        for a in range(start, stop, longest)
    ]


def groups(predecessor_M: Tensor, position_M: Tensor) -> list[Group]:
    """All segments, those of like size together."""
    runs = segments(predecessor_M)
    paths = _paths(runs, predecessor_M, position_M)
    order = sorted(range(len(runs)), key=lambda s: (len(paths[s]), len(runs[s])))
    found: list[list[int]] = []
    scores = widest = 0
    for s in order:
        scores, widest = scores + len(runs[s]) * len(paths[s]), max(widest, len(runs[s]))
        if not found or (len(found[-1]) + 1) * widest * len(paths[s]) > WASTE * scores:
            found.append([])
            scores, widest = len(runs[s]) * len(paths[s]), len(runs[s])
        found[-1].append(s)
    return [_group([runs[s] for s in g], [paths[s] for s in g], position_M) for g in found]


def rows_of(found: Sequence[Group], tokens: int) -> Tensor:
    """Where each token is in all groups' queries, flattened one after another, [M]."""
    query = torch.cat([group.query_BQ.flatten() for group in found])
    row_M = torch.zeros(tokens, dtype=torch.int64)
    # a segment's first token may come again as padding: its first place
    return row_M.scatter_reduce_(0, query, torch.arange(len(query)), "amin", include_self=False)


def _paths(runs: Sequence[range], predecessor_M: Tensor, position_M: Tensor) -> list[Tensor]:
    """Of each segment, the tokens it attends to: from the prompt's first to its own last."""
    run_M = torch.repeat_interleave(
        torch.arange(len(runs)), torch.tensor([len(run) for run in runs])
    ).tolist()
    found: list[Tensor] = []
    for run in runs:
        before = int(predecessor_M[run.start])
        own = torch.arange(run.start, run.stop)
        above = found[run_M[before]][: int(position_M[before]) + 1] if before >= 0 else own[:0]
        found.append(torch.cat([above, own]))
    return found


def _group(runs: Sequence[range], paths: Sequence[Tensor], position_M: Tensor) -> Group:
    queries, keys = max(map(len, runs)), max(map(len, paths))
    query_BQ = torch.stack(
        [torch.tensor([*run, *[run.start] * (queries - len(run))]) for run in runs]
    )
    key_BK = torch.stack([torch.cat([p, p[:1].expand(keys - len(p))]) for p in paths])
    # the keys of a path lie in the order of their positions, padding after the last
    visible_BQK = torch.arange(keys) <= position_M[query_BQ][..., None]
    return Group(query_BQ, key_BK, visible_BQK)


def visible_blocks(last_M: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Blocks of queries (rows) by blocks of keys: some pair visible, all pairs visible; [n, n].

    `block` divides M. Left of the diagonal, key k reaches a block of queries if it reaches the
    first of them, and all of them if it reaches the last.
    """
    last_nb = last_M.view(-1, block)
    n = torch.arange(len(last_nb), device=last_M.device)
    first_q, final_q = n * block, n * block + block - 1
    below = n[:, None] > n[None, :]
    some = below & (last_nb.amax(1)[None, :] >= first_q[:, None])
    every = below & (last_nb.amin(1)[None, :] >= final_q[:, None])
    return some | torch.eye(len(n), dtype=torch.bool, device=last_M.device), every
