"""From scored trees to packs: sequences in which each token of a tree stands once.

Shapes: N nodes of a tree, M tokens of a pack, T of them with a term in the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ibtree.tree import Tree
from learner.batch import TrainedTree, tree_advantages
from learner.config import LearnerConfig
from learner.math.packing import Layout, Part, cut, first_fit, layout, subtree_sums


@dataclass(frozen=True)
class Piece:
    """One tree, or one part of it."""

    ids: Tensor
    layout: Layout
    target: Tensor
    """The tokens whose terms count here, ascending indices [T]; those after are of each, [T]."""
    old_logp: Tensor
    versions: Tensor
    node: Tensor
    advantage: Tensor
    weight: Tensor


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


def tree_pieces(trained: TrainedTree, config: LearnerConfig) -> list[Piece]:
    """The tree, in several parts if it has more than `micro_batch_tokens` unique tokens."""
    tree = trained.tree
    order = depth_first(tree)
    at = {node: i for i, node in enumerate(order)}
    parents = [at[tree.parents[node]] for node in order]
    lengths = [len(tree.prompt), *(len(tree.steps[node].token_ids) for node in order[1:])]
    weight_N = subtree_sums(parents, trained.share_N[order])
    advantage_N = tree_advantages(tree, config)[order]
    return [
        _piece(tree, trained.first, order, parents, lengths, weight_N, advantage_N, part)
        for part in cut(parents, lengths, config.micro_batch_tokens)
    ]


def _piece(
    tree: Tree,
    first: int,
    order: Sequence[int],
    parents: Sequence[int],
    lengths: Sequence[int],
    weight_N: Tensor,
    advantage_N: Tensor,
    part: Part,
) -> Piece:
    at = {n: i for i, n in enumerate(part.nodes)}
    placed = layout([at[parents[n]] for n in part.nodes], [lengths[n] for n in part.nodes])
    target = torch.nonzero(placed.node >= part.repeated).squeeze(1)
    node_T = torch.tensor(part.nodes)[placed.node[target]]
    steps = [tree.steps[order[n]] for n in part.nodes[1:]]
    counted = [tree.steps[order[n]] for n in part.nodes[part.repeated :]]
    return Piece(
        ids=torch.tensor([*tree.prompt, *(t for s in steps for t in s.token_ids)]),
        layout=placed,
        target=target,
        old_logp=torch.tensor([lp for s in counted for lp in s.logprobs], dtype=torch.float64),
        versions=torch.tensor([v for s in counted for v in s.versions]),
        node=first + torch.tensor(order)[node_T],
        advantage=advantage_N[node_T],
        weight=weight_N[node_T],
    )


def packs(pieces: Sequence[Piece], micro_batch_tokens: int) -> Iterator[Pack]:
    """All pieces, several in a pack of at most `micro_batch_tokens` (or one larger piece)."""
    for indices in first_fit([len(piece.ids) for piece in pieces], micro_batch_tokens):
        yield pack([pieces[i] for i in indices])


def pack(pieces: Sequence[Piece]) -> Pack:
    """These pieces in one sequence; none sees another."""
    starts = torch.tensor([0, *(len(piece.ids) for piece in pieces)]).cumsum(0).tolist()
    pairs = list(zip(pieces, starts[:-1], strict=True))
    return Pack(
        ids=torch.cat([piece.ids for piece in pieces]),
        position=torch.cat([piece.layout.position for piece in pieces]),
        predecessor=torch.cat([_moved(piece.layout.predecessor, start) for piece, start in pairs]),
        last=torch.cat([piece.layout.last + start for piece, start in pairs]),
        target=torch.cat([piece.target + start for piece, start in pairs]),
        old_logp=torch.cat([piece.old_logp for piece in pieces]),
        versions=torch.cat([piece.versions for piece in pieces]),
        node=torch.cat([piece.node for piece in pieces]),
        advantage=torch.cat([piece.advantage for piece in pieces]),
        weight=torch.cat([piece.weight for piece in pieces]),
    )


def _moved(predecessor: Tensor, start: int) -> Tensor:
    return torch.where(predecessor < 0, predecessor, predecessor + start)


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
