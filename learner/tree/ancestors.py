"""Attention to ancestors only, without an M x M mask: segments for SDPA, blocks for FlexAttention.

Shapes: M tokens in depth-first order; S segments, in groups of B with Q new tokens and K tokens of
their paths, padded; n blocks of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from learner.algo import Ints

LONGEST = 128
"""Most new tokens of a segment: of the scores among them nearly half are masked out."""
WASTE = 1.1
"""A group may compute this many times the scores it needs: padding against calls."""


class Group(NamedTuple):
    """Segments that attend in one call; padding repeats a segment's first query and last key."""

    query_BQ: Tensor
    position_BQ: Tensor
    key_BK: Tensor
    """The paths' tokens in the order of their positions, padding after the last."""

    @property
    def visible_BQK(self) -> Tensor:
        return torch.arange(self.key_BK.shape[1]) <= self.position_BQ[..., None]


def visible(last_M: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """True where the token `key` is `query` or above it (indices that broadcast)."""
    return (key <= query) & (query <= last_M[key])


def segments(predecessor_M: Ints, longest: int = LONGEST) -> Ints:
    """Runs of tokens that follow each other in the tree: each rollout's new tokens, in stretches
    of at most `longest`. The first token of each and the one after its last, int64 [S, 2]."""
    index = np.arange(len(predecessor_M))
    starts = np.nonzero((predecessor_M != index - 1) | (predecessor_M < 0))[0]
    lengths = np.diff(starts, append=len(index))
    stretches = -(-lengths // longest)
    nth = np.arange(stretches.sum()) - np.repeat(np.cumsum(stretches) - stretches, stretches)
    first_S = np.repeat(starts, stretches) + nth * longest
    return np.stack([first_S, np.append(first_S[1:], len(index))], 1)


def groups(predecessor: Tensor, position: Tensor) -> list[Group]:
    """All segments, those of like size together; of each token int64 [M], as in Layout."""
    predecessor_M, position_M = predecessor.numpy(), position.numpy()
    runs_S2 = segments(predecessor_M)
    new_S = runs_S2[:, 1] - runs_S2[:, 0]
    keys_S = position_M[runs_S2[:, 1] - 1] + 1
    order = np.lexsort((new_S, keys_S))
    runs_S2, new_S, keys_S = runs_S2[order], new_S[order], keys_S[order]
    path_SK = _paths(runs_S2[:, 1] - 1, predecessor_M, position_M)
    segment_groups: list[Group] = []
    for low, high in pairwise(_borders(new_S.tolist(), keys_S.tolist())):
        queries, keys = int(new_S[low:high].max()), int(keys_S[high - 1])
        index_Q = np.arange(queries)
        offset_BQ = np.where(index_Q < new_S[low:high, None], index_Q, 0)
        query_BQ = runs_S2[low:high, :1] + offset_BQ
        key_BK = np.ascontiguousarray(path_SK[low:high, :keys])
        columns = (query_BQ, position_M[query_BQ], key_BK)
        segment_groups.append(Group(*map(torch.from_numpy, columns)))
    return segment_groups


def _borders(new: Sequence[int], keys: Sequence[int]) -> list[int]:
    """Borders of the groups of segments with so many new tokens and keys: where each begins, and
    the end. Keys ascend."""
    borders, scores, widest = [0], 0, 0
    for s, (queries, length) in enumerate(zip(new, keys, strict=True)):
        scores, widest = scores + queries * length, max(widest, queries)
        if s > borders[-1] and (s + 1 - borders[-1]) * widest * length > WASTE * scores:
            borders.append(s)
            scores, widest = queries * length, queries
    return [*borders, len(new)]


def rows_of(query: Tensor, tokens: int) -> Tensor:
    """Index of each token in all groups' queries, flattened one after another, [M]."""
    row_M = np.empty(tokens, np.int64)
    # a segment's first token may come again as padding: the last written stays, its first index
    row_M[query.numpy()[::-1]] = np.arange(len(query))[::-1]
    return torch.from_numpy(row_M)


def _paths(token_S: Ints, predecessor_M: Ints, position_M: Ints) -> Ints:
    """The tokens from the prompt's first to each of these, by position, [S, K]; a shorter path is
    padded with its last token. Positions ascend."""
    position_S = position_M[token_S]
    path_KS = np.empty((int(position_S[-1]) + 1, len(token_S)), np.int64)
    begins_K = np.searchsorted(position_S, np.arange(len(path_KS)))
    token_S = token_S.copy()
    for k in range(len(path_KS) - 1, -1, -1):  # all paths that reach so deep, a token up at once
        path_KS[k] = token_S
        token_S[begins_K[k] :] = predecessor_M[token_S[begins_K[k] :]]
    return path_KS.T


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
