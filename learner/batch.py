"""From scored trees to rows of tokens: one row a distinct trajectory.

Shapes: N nodes of a tree, B rows, S prompt and completion tokens, T generated tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ibtree import score
from ibtree.tree import Tree
from learner.config import LearnerConfig
from learner.math.advantage import NO_SPREAD, step_advantages
from learner.math.loss import tree_shares
from learner.math.packing import Floats


@dataclass(frozen=True)
class TrainedTree:
    """A tree that enters the loss."""

    tree: Tree
    share_N: Floats
    """As in Shares."""
    scale: float
    """What they are multiplied by in this batch."""
    first: int
    """The number of its first node when the nodes of all trees of the batch are counted through."""


@dataclass(frozen=True)
class Row:
    """One trajectory: prompt and generated ids, and per generated token the engine's
    log-probability, the weight version, and the number in the batch and advantage of its step."""

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    nodes: tuple[int, ...]
    advantages: tuple[float, ...]
    share: float
    """What each of its tokens counts in the batch's loss."""
    shared: int
    """Its first tokens that lie on an earlier row of the tree too."""


@dataclass(frozen=True)
class Rows:
    """Padded tensors of several rows; [B, S] for ids and their mask, [B, T] per generated token."""

    ids: Tensor
    ids_mask: Tensor
    prompt_lengths: Tensor
    mask: Tensor
    counted: Tensor
    """1 where figures count the token: once a tree, on its first row."""
    old_logp: Tensor
    versions: Tensor
    node: Tensor
    advantage: Tensor
    weight: Tensor


def is_uniform(tree: Tree) -> bool:
    """True if all trajectories have one reward: nothing to compare."""
    return bool(np.ptp(tree.rewards()) <= NO_SPREAD)


def tree_advantages(
    tree: Tree, config: LearnerConfig, reference_logp_N: Tensor | None = None
) -> Tensor:
    """A(s) of each node, float64, [N] (algorithm in learner/math/advantage.py). The confidence in a
    step is the behaviour policy's, or the reference's where its log-probabilities are given."""
    options = tree.options
    value = score.values(tree, config.value_estimator)
    gain = score.info_gains(tree, value, config.beta, options.zero_value_ratio)
    logprobs = None if reference_logp_N is None else reference_logp_N.numpy()
    confidence = score.confidences(tree, config.confidence, logprobs)
    lengths = torch.tensor([len(step.token_ids) for step in tree.steps], dtype=torch.float64)
    return step_advantages(
        torch.from_numpy(value),
        torch.from_numpy(gain),
        torch.from_numpy(confidence),
        torch.from_numpy(tree.rewards()),
        local_weight=config.local_weight,
        std=config.std,
        eps=config.advantage_eps,
        length_N=lengths if config.local_scale == "step" else None,
    )


class Shares(NamedTuple):
    """What each token of a trajectory that ends at a node counts in the loss, [N] (0 where none
    ends), before the division by the sum of `whole` over the batch; `uniform` as is_uniform."""

    share_N: Floats
    whole: float
    uniform: bool


def shares_of(tree: Tree, config: LearnerConfig) -> Shares:
    """In one pass over the nodes: paths share most of their steps."""
    depth_N = np.zeros(len(tree), np.int64)
    for node in tree.topological():
        depth_N[node] = depth_N[tree.parents[node]] + len(tree.steps[node].token_ids)
    ends = tree.end_nodes()
    its = tree_shares(
        depth_N[ends],
        score.trajectory_weights(tree, config.trajectory_weight)[ends],
        tree.trajectories,
        length_norm=config.length_norm,
        constant_tokens=config.max_new_tokens,
    )
    share_N = np.zeros(len(tree))
    share_N[ends] = its.share_B
    return Shares(share_N, its.whole, is_uniform(tree))


def trained_trees(
    trees: Sequence[Tree], config: LearnerConfig, shares: Callable[[Tree], Shares] | None = None
) -> list[TrainedTree]:
    """The trees to train on; `shares` may know what shares_of would find.

    Uniform trees are left out if they are to be skipped; with `uniform_in_denominator` they
    still count where the loss is normalised, whatever the normalisation.
    """
    found = [(tree, shares_of(tree, config) if shares is None else shares(tree)) for tree in trees]
    kept = [(t, its) for t, its in found if not (config.skip_uniform_trees and its.uniform)]
    counted = found if config.uniform_in_denominator else kept
    scale = 1.0 / max(sum(its.whole for _, its in counted), 1.0)
    firsts = accumulate((len(tree) for tree, _ in kept), initial=0)
    return [
        TrainedTree(tree, its.share_N, scale, first)
        for (tree, its), first in zip(kept, firsts, strict=False)
    ]


def tree_rows(trained: TrainedTree, config: LearnerConfig) -> list[Row]:
    """A row for each node with which trajectories end."""
    tree = trained.tree
    advantages = tree_advantages(tree, config).tolist()
    shares = (trained.share_N * trained.scale).tolist()
    rows, seen = [], set[int]()
    for end in tree.end_nodes():
        path = tree.path(end)
        steps = [tree.steps[n] for n in path]
        rows.append(
            Row(
                prompt=tree.prompt,
                token_ids=tuple(t for s in steps for t in s.token_ids),
                logprobs=tuple(lp for s in steps for lp in s.logprobs),
                versions=tuple(v for s in steps for v in s.versions),
                nodes=tuple(trained.first + n for n in path for _ in tree.steps[n].token_ids),
                advantages=tuple(advantages[n] for n in path for _ in tree.steps[n].token_ids),
                share=shares[end],
                shared=sum(len(tree.steps[n].token_ids) for n in path if n in seen),
            )
        )
        seen.update(path)
    return rows


def split_rows(rows: Sequence[Row], micro_batch_tokens: int) -> Iterator[list[Row]]:
    """Rows of similar length together, at most `micro_batch_tokens` with padding (or one row)."""
    part: list[Row] = []
    for row in sorted(rows, key=lambda r: len(r.prompt) + len(r.token_ids)):
        longest = len(row.prompt) + len(row.token_ids)
        if part and (len(part) + 1) * longest > micro_batch_tokens:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def pad(rows: Sequence[Row], device: torch.device) -> Rows:
    """Tensors of these rows on `device`."""
    wide = max(len(row.prompt) + len(row.token_ids) for row in rows)
    width = max(len(row.token_ids) for row in rows)

    def ids(row: Row) -> list[int]:
        tokens = [*row.prompt, *row.token_ids]
        return tokens + [0] * (wide - len(tokens))

    def column(values: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
        padded = [[*v, *([0] * (width - len(v)))] for v in values]
        return torch.tensor(padded, dtype=dtype, device=device)

    totals = torch.tensor([len(r.prompt) + len(r.token_ids) for r in rows], device=device)
    lengths = torch.tensor([len(row.token_ids) for row in rows], device=device)
    shared = torch.tensor([row.shared for row in rows], device=device)
    index = torch.arange(width, device=device)[None, :]
    mask = (index < lengths[:, None]).float()
    shares = torch.tensor([row.share for row in rows], dtype=torch.float64, device=device)
    return Rows(
        ids=torch.tensor([ids(row) for row in rows], device=device),
        ids_mask=(torch.arange(wide, device=device)[None, :] < totals[:, None]).long(),
        prompt_lengths=torch.tensor([len(row.prompt) for row in rows], device=device),
        mask=mask,
        counted=mask * (index >= shared[:, None]),
        old_logp=column([row.logprobs for row in rows], torch.float64),
        versions=column([row.versions for row in rows], torch.int64),
        node=column([row.nodes for row in rows], torch.int64),
        advantage=column([row.advantages for row in rows], torch.float64),
        weight=shares[:, None] * mask,
    )
