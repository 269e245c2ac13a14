"""Packs made of scored trees: sequences in which each token of a tree stands once.

Shapes: N nodes of a tree, M tokens of a pack, T of them with a term in the loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ibtree.tree import Floats, Ints, Tree
from learner.config import LearnerConfig
from learner.tree.layout import Layout, Part, cut, first_fit, layout, subtree_stops, subtree_sums
from learner.tree.training import TrainingTree, tree_advantages


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
    weight: Floats
    """w_t before the batch's scale."""


class Piece(NamedTuple):
    """A draft in its batch."""

    draft: Draft
    training_tree: TrainingTree


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


def drafts(tree: Tree, end_weight_N: Floats, config: LearnerConfig) -> list[Draft]:
    """The tree, in several parts if it has more than `micro_batch_tokens` unique tokens;
    `end_weight_N`: the `weight_N` of its LossWeights."""
    order = depth_first(tree)
    at = {node: i for i, node in enumerate(order)}
    parents = [at[tree.parents[node]] for node in order]
    lengths = [len(tree.prompt), *(len(tree.steps[node].token_ids) for node in order[1:])]
    advantage_N, weight_N = tree_advantages(tree, config).numpy(), np.zeros(len(tree))
    weight_N[order] = subtree_sums(subtree_stops(parents), end_weight_N[order])
    return [
        _draft(tree, order, parents, lengths, advantage_N, weight_N, part)
        for part in cut(parents, lengths, config.micro_batch_tokens)
    ]


def _draft(
    tree: Tree,
    order: Sequence[int],
    parents: Sequence[int],
    lengths: Sequence[int],
    advantage_N: Floats,
    weight_N: Floats,
    part: Part,
) -> Draft:
    at = {n: i for i, n in enumerate(part.nodes)}
    part_layout = layout([at[parents[n]] for n in part.nodes], [lengths[n] for n in part.nodes])
    nodes = [order[n] for n in part.nodes]
    counted = [tree.steps[n] for n in nodes[part.repeated :]]
    target = np.nonzero(part_layout.node >= part.repeated)[0]
    node = np.asarray(nodes)[part_layout.node[target]]
    above = [t for n in nodes[1:] for t in tree.steps[n].token_ids]
    return Draft(
        ids=np.asarray([*tree.prompt, *above]),
        layout=part_layout,
        target=target,
        old_logp=np.asarray([lp for s in counted for lp in s.logprobs], float),
        versions=np.asarray([v for s in counted for v in s.versions], int),
        node=node,
        advantage=advantage_N[node],
        weight=weight_N[node],
    )


def packs(pieces: Sequence[Piece], micro_batch_tokens: int) -> Iterator[Pack]:
    """All pieces, several in a pack of at most `micro_batch_tokens` (or one larger piece)."""
    for indices in first_fit([len(piece.draft.ids) for piece in pieces], micro_batch_tokens):
        yield pack([pieces[i] for i in indices])


def pack(pieces: Sequence[Piece]) -> Pack:
    """These pieces in one sequence; none sees another."""
    parts = [piece.draft for piece in pieces]
    lengths = [len(draft.ids) for draft in parts]
    starts = np.cumsum([0, *lengths[:-1]])
    moved = np.repeat(starts, lengths)

    def joined(columns: Iterable[Ints | Floats]) -> Any:
        return np.concatenate(list(columns))

    predecessor = joined(draft.layout.predecessor for draft in parts)
    merged = {
        "ids": joined(draft.ids for draft in parts),
        "position": joined(draft.layout.position for draft in parts),
        "predecessor": np.where(predecessor < 0, predecessor, predecessor + moved),
        "last": joined(draft.layout.last for draft in parts) + moved,
        "target": joined(d.target + start for d, start in zip(parts, starts, strict=True)),
        "old_logp": joined(draft.old_logp for draft in parts),
        "versions": joined(draft.versions for draft in parts),
        "node": joined(draft.node + training_tree.first for draft, training_tree in pieces),
        "advantage": joined(draft.advantage for draft in parts),
        "weight": joined(draft.weight * training_tree.scale for draft, training_tree in pieces),
    }
    return Pack(**{name: torch.from_numpy(column) for name, column in merged.items()})


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
