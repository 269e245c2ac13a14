"""A tree's packed form: each token once, in depth-first order.

Shapes: N nodes in depth-first order, node 0 the prompt, `parents` are indices into them;
M tokens of the sequence, the prompt's first. Token k is on the path of token q, and so visible to
it, exactly if k <= q <= last[k]: the interval test of a depth-first order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from learner.algo import Floats, Ints


class Layout(NamedTuple):
    """A column per figure of the tokens, each int64 [M]."""

    node: Ints
    predecessor: Ints
    """The token before it in the tree: there its log-probability is read. -1: none."""
    position: Ints
    """Its depth in tokens, prompt included."""
    last: Ints
    """The last token below it, itself if none is."""


def layout(parents: Sequence[int], lengths: Sequence[int]) -> Layout:
    """The layout of the tokens of nodes with these lengths [tokens, at least 1]."""
    length_N, above_N = np.asarray(lengths), np.asarray(parents)
    stop_N = np.cumsum(length_N)
    start_N = stop_N - length_N
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + lengths[parent])
    node = np.repeat(np.arange(len(length_N)), length_N)
    index = np.arange(stop_N[-1])
    predecessor = index - 1
    predecessor[start_N[1:]] = stop_N[above_N[1:]] - 1
    position = index + (np.asarray(depths) - start_N)[node]
    last = stop_N[subtree_stops(parents) - 1][node] - 1
    return Layout(node, predecessor, position, last)


def subtree_stops(parents: Sequence[int]) -> Ints:
    """The index after the last node below each node, [N]."""
    stops = list(range(1, len(parents) + 1))
    for n in range(len(parents) - 1, 0, -1):
        stops[parents[n]] = max(stops[parents[n]], stops[n])
    return np.asarray(stops)


def subtree_sums(stop_N: Ints, value_N: Floats) -> Floats:
    """Sum of the values at or below each node, [N]: w_t from the weights of the trajectories that
    end at the nodes. A subtree is an interval up to its `subtree_stops`."""
    before = np.concatenate([[0.0], np.cumsum(value_N)])
    return np.asarray(before[stop_N] - before[:-1])


class Part(NamedTuple):
    """Some nodes of a tree with all that lies above them."""

    nodes: list[int]
    """Indices in depth-first order; the first `repeated` of them are counted in another part."""
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
