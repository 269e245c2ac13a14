"""From scored trees to packs: sequences in which each token of a tree stands once.

Shapes: N nodes of a tree, M tokens of a pack, T of them with a term in the loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ibtree.tree import Floats, Ints, Tree
from learner.batch import TrainedTree, tree_advantages
from learner.config import LearnerConfig
from learner.math.packing import (
    Layout,
    Part,
    cut,
    first_fit,
    layout,
    subtree_stops,
    subtree_sums,
)


@dataclass(frozen=True)
class Draft:
    """One tree, or one part of it, before the batch is known that it is trained in."""

    ids: Ints
    layout: Layout
    target: Ints
    """The tokens whose terms count here, ascending indices [T]; those after are of each, [T]."""
    old_logp: Floats
    versions: Ints
    node: Ints
    advantage: Floats


@dataclass(frozen=True)
class Piece(Draft):
    """A draft in its batch, whose nodes are counted through."""

    weight: Floats


@dataclass(frozen=True)
class Drafts:
    """All that can be made of a tree's packs before the batch is known: all but the weights."""

    order: Ints
    """The nodes in depth-first order, [N], and for each where those below it stop."""
    stops: Ints
    parts: list[Draft]

    def pieces(self, trained: TrainedTree) -> list[Piece]:
        weight_N = np.zeros(len(trained.tree))
        weight_N[self.order] = subtree_sums(self.stops, trained.share_N.numpy()[self.order])
        return [
            Piece(**{**vars(part), "node": part.node + trained.first}, weight=weight_N[part.node])
            for part in self.parts
        ]


@dataclass(frozen=True)
class Pack:
    """Pieces one after another; [M] per token, [T] per token with a term in the loss."""

    ids: Tensor
    position: Tensor
    predecessor: Tensor
    last: Tensor
    target: Tensor
    old_logp: Tensor
    versions: Tensor
    node: Tensor
    advantage: Tensor
    weight: Tensor

    @property
    def counted(self) -> Tensor:
        """1 where figures count the token: everywhere, each stands once."""
        return torch.ones_like(self.weight)

    def to(self, device: torch.device) -> Pack:
        return Pack(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def depth_first(tree: Tree) -> list[int]:
    """Every node, the root first, each child with all that is below it before the next."""
    order, stack = [], [0]
    while stack:
        node = stack.pop()
        order.append(node)
        stack.extend(reversed(tree.children(node)))
    return order


def drafts(tree: Tree, config: LearnerConfig) -> Drafts:
    """The tree, in several parts if it has more than `micro_batch_tokens` unique tokens."""
    order = depth_first(tree)
    at = {node: i for i, node in enumerate(order)}
    parents = [at[tree.parents[node]] for node in order]
    lengths = [len(tree.prompt), *(len(tree.steps[node].token_ids) for node in order[1:])]
    advantage_N = tree_advantages(tree, config).numpy()
    parts = [
        _draft(tree, order, parents, lengths, advantage_N, part)
        for part in cut(parents, lengths, config.micro_batch_tokens)
    ]
    return Drafts(np.asarray(order), subtree_stops(parents), parts)


def _draft(
    tree: Tree,
    order: Sequence[int],
    parents: Sequence[int],
    lengths: Sequence[int],
    advantage_N: Floats,
    part: Part,
) -> Draft:
    at = {n: i for i, n in enumerate(part.nodes)}
    placed = layout([at[parents[n]] for n in part.nodes], [lengths[n] for n in part.nodes])
    nodes = [order[n] for n in part.nodes]
    counted = [tree.steps[n] for n in nodes[part.repeated :]]
    target = np.nonzero(placed.node >= part.repeated)[0]
    node = np.asarray(nodes)[placed.node[target]]
    above = [t for n in nodes[1:] for t in tree.steps[n].token_ids]
    return Draft(
        ids=np.asarray([*tree.prompt, *above]),
        layout=placed,
        target=target,
        old_logp=np.asarray([lp for s in counted for lp in s.logprobs], float),
        versions=np.asarray([v for s in counted for v in s.versions], int),
        node=node,
        advantage=advantage_N[node],
    )


def packs(pieces: Sequence[Piece], micro_batch_tokens: int) -> Iterator[Pack]:
    """All pieces, several in a pack of at most `micro_batch_tokens` (or one larger piece)."""
    for indices in first_fit([len(piece.ids) for piece in pieces], micro_batch_tokens):
        yield pack([pieces[i] for i in indices])


def pack(pieces: Sequence[Piece]) -> Pack:
    """These pieces in one sequence; none sees another."""
    lengths = [len(piece.ids) for piece in pieces]
    starts = np.cumsum([0, *lengths[:-1]])
    moved = np.repeat(starts, lengths)

    def joined(parts: Iterable[Ints | Floats]) -> Any:
        return np.concatenate(list(parts))

    predecessor = joined(piece.layout.predecessor for piece in pieces)
    columns = {
        "ids": joined(piece.ids for piece in pieces),
        "position": joined(piece.layout.position for piece in pieces),
        "predecessor": np.where(predecessor < 0, predecessor, predecessor + moved),
        "last": joined(piece.layout.last for piece in pieces) + moved,
        "target": joined(p.target + start for p, start in zip(pieces, starts, strict=True)),
        "old_logp": joined(piece.old_logp for piece in pieces),
        "versions": joined(piece.versions for piece in pieces),
        "node": joined(piece.node for piece in pieces),
        "advantage": joined(piece.advantage for piece in pieces),
        "weight": joined(piece.weight for piece in pieces),
    }
    return Pack(**{name: torch.from_numpy(column) for name, column in columns.items()})


def padded(pack: Pack, tokens: int) -> Pack:
    """The pack with `tokens` tokens; those added see themselves only and have no term."""
    index = torch.arange(len(pack.ids), tokens)
    zeros = torch.zeros_like(index)
    return replace(
        pack,
        ids=torch.cat([pack.ids, zeros]),
        position=torch.cat([pack.position, zeros]),
        predecessor=torch.cat([pack.predecessor, zeros - 1]),
        last=torch.cat([pack.last, index]),
    )
