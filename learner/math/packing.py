"""A tree's packed form: each token once, in depth-first order.

Shapes: N nodes in depth-first order, node 0 the prompt, `parents` are indices into them;
M tokens of the sequence, the prompt's first. Token k is on the path of token q, and so visible to
it, exactly if k <= q <= last[k]: the interval test of a depth-first order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Of each token, int64 [M]."""

    node: Tensor
    predecessor: Tensor
    """The token before it in the tree: there its log-probability is read. -1: none."""
    position: Tensor
    """Its depth in tokens, prompt included."""
    last: Tensor
    """The last token below it, itself if none is."""


def layout(parents: Sequence[int], lengths: Sequence[int]) -> Layout:
    """Where the tokens of nodes with these lengths [tokens, at least 1] lie."""
    starts: list[int] = []
    stops: list[int] = []
    depths: list[int] = []
    for parent, length in zip(parents, lengths, strict=True):
        start = stops[-1] if stops else 0
        depths.append(depths[parent] + lengths[parent] if starts else 0)
        starts.append(start)
        stops.append(start + length)
    ends = subtree_stops(parents, stops)
    length_N, start_N = torch.tensor(lengths), torch.tensor(starts)
    node = torch.repeat_interleave(torch.arange(len(lengths)), length_N)
    index = torch.arange(stops[-1])
    predecessor = index - 1
    for n in range(1, len(parents)):
        predecessor[starts[n]] = stops[parents[n]] - 1
    position = torch.tensor(depths)[node] + index - start_N[node]
    return Layout(node, predecessor, position, torch.tensor(ends)[node] - 1)


def subtree_stops(parents: Sequence[int], stops: Sequence[int]) -> list[int]:
    """The largest of `stops` at or below each node."""
    found = list(stops)
    for n in range(len(parents) - 1, 0, -1):
        found[parents[n]] = max(found[parents[n]], found[n])
    return found


def subtree_sums(parents: Sequence[int], value_N: Tensor) -> Tensor:
    """Sum of the values at or below each node, [N]: w_t from the shares of the trajectories that
    end at the nodes."""
    found = value_N.tolist()
    for n in range(len(parents) - 1, 0, -1):
        found[parents[n]] += found[n]
    return torch.tensor(found, dtype=value_N.dtype)


class Part(NamedTuple):
    """Some nodes of a tree with all that lies above them."""

    nodes: list[int]
    """In depth-first order; the first `repeated` of them are counted in another part."""
    repeated: int


def cut(parents: Sequence[int], lengths: Sequence[int], limit: int) -> list[Part]:
    """The tree in parts of at most `limit` tokens, each node but the prompt counted in one.

    A cut comes after a leaf, so that what follows is a subtree or the rest of one; the path above
    it is repeated. A single trajectory is never cut, whatever its length.
    """
    parts: list[Part] = []
    part, used = Part([0], 1), lengths[0]
    for chain in chains(parents):
        new = sum(lengths[n] for n in chain)
        if used + new > limit and len(part.nodes) > part.repeated:
            parts.append(part)
            above = path(parents, parents[chain[0]])
            part, used = Part(above, len(above)), sum(lengths[n] for n in above)
        part.nodes.extend(chain)
        used += new
    return [*parts, part]


def chains(parents: Sequence[int]) -> list[range]:
    """The nodes below the prompt from each branch down to a leaf: first children follow on."""
    branches = [n for n in range(1, len(parents)) if n == 1 or parents[n] != n - 1]
    return [range(a, b) for a, b in zip(branches, [*branches[1:], len(parents)], strict=True)]


def path(parents: Sequence[int], node: int) -> list[int]:
    """The nodes from the prompt down to `node`."""
    up = [node]
    while up[-1]:
        up.append(parents[up[-1]])
    return up[::-1]


def first_fit(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Indices in bins of at most `limit` together, largest first; one that is larger is alone."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = next((b for b, free in enumerate(room) if sizes[i] <= free), None)
        if at is None:
            at = len(bins)
            bins.append([])
            room.append(limit)
        bins[at].append(i)
        room[at] -= sizes[i]
    return bins
