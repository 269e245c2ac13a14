"""From scored trees to rows of tokens: one row a distinct trajectory.

Shapes: B rows, S prompt and completion tokens, T generated tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ibtree import score
from ibtree.tree import Tree
from learner.config import LearnerConfig
from learner.math.advantage import NO_SPREAD, step_advantages
from learner.math.loss import token_weights


@dataclass(frozen=True)
class Row:
    """One trajectory: prompt and generated ids, and per generated token the engine's
    log-probability, the weight version and the advantage of its step."""

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    advantages: tuple[float, ...]
    weight: float
    """Weight in its tree; the rows of a tree sum to 1."""
    group: int
    """G of its tree."""
    share: float = 0.0
    """What each of its tokens counts in the batch's loss; set by `share_out`."""


@dataclass(frozen=True)
class Rows:
    """Padded tensors of several rows; [B, S] for ids and their mask, [B, T] per generated token."""

    ids: Tensor
    ids_mask: Tensor
    prompt_lengths: Tensor
    mask: Tensor
    old_logp: Tensor
    versions: Tensor
    advantage: Tensor
    weight: Tensor


def is_uniform(tree: Tree) -> bool:
    """True if all trajectories have one reward: nothing to compare."""
    return bool(np.ptp(tree.rewards()) <= NO_SPREAD)


def tree_advantages(tree: Tree, config: LearnerConfig) -> Tensor:
    """A(s) of each node, float64, [N] (algorithm in learner/math/advantage.py)."""
    options = tree.options
    value = score.values(tree, config.value_estimator)
    gain = score.info_gains(tree, value, config.beta, options.zero_value_ratio)
    confidence = score.confidences(tree, config.confidence)
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


def tree_rows(tree: Tree, config: LearnerConfig) -> list[Row]:
    """A row for each node with which trajectories end."""
    advantages = tree_advantages(tree, config).tolist()
    weights = score.trajectory_weights(tree, config.trajectory_weight)
    rows = []
    for end in tree.end_nodes():
        path = tree.path(end)
        steps = [tree.steps[n] for n in path]
        rows.append(
            Row(
                prompt=tree.prompt,
                token_ids=tuple(t for s in steps for t in s.token_ids),
                logprobs=tuple(lp for s in steps for lp in s.logprobs),
                versions=tuple(v for s in steps for v in s.versions),
                advantages=tuple(advantages[n] for n in path for _ in tree.steps[n].token_ids),
                weight=float(weights[end]),
                group=tree.trajectories,
            )
        )
    return rows


def batch_rows(trees: Sequence[Tree], config: LearnerConfig) -> tuple[list[Row], int]:
    """The rows to train on with their shares, and how many trees they come from.

    Uniform trees are left out if they are to be skipped; with `uniform_in_denominator` they
    still count where the loss is normalised, whatever the normalisation.
    """
    skip = config.skip_uniform_trees
    trained = [not (skip and is_uniform(tree)) for tree in trees]
    counted = [i for i, t in enumerate(trained) if t or config.uniform_in_denominator]
    owned = [(i, row) for i in counted for row in tree_rows(trees[i], config)]
    if not any(trained):
        return [], 0
    shared = share_out([row for _, row in owned], len(counted), config)
    kept = [row for (i, _), row in zip(owned, shared, strict=True) if trained[i]]
    return kept, sum(trained)


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


def share_out(rows: Sequence[Row], trees: int, config: LearnerConfig) -> list[Row]:
    """The rows with their shares in the loss of a batch of `trees` trees."""
    lengths = torch.tensor([len(row.token_ids) for row in rows])
    mask = (torch.arange(int(lengths.max()))[None, :] < lengths[:, None]).double()
    weights = token_weights(
        mask,
        torch.tensor([row.weight for row in rows], dtype=torch.float64),
        torch.tensor([row.group for row in rows], dtype=torch.float64),
        trees=trees,
        length_norm=config.length_norm,
        constant_tokens=config.max_new_tokens,
    )
    return [replace(row, share=float(weights[i, 0])) for i, row in enumerate(rows)]


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
    mask = (torch.arange(width, device=device)[None, :] < lengths[:, None]).float()
    shares = torch.tensor([row.share for row in rows], device=device)
    return Rows(
        ids=torch.tensor([ids(row) for row in rows], device=device),
        ids_mask=(torch.arange(wide, device=device)[None, :] < totals[:, None]).long(),
        prompt_lengths=torch.tensor([len(row.prompt) for row in rows], device=device),
        mask=mask,
        old_logp=column([row.logprobs for row in rows], torch.float32),
        versions=column([row.versions for row in rows], torch.int64),
        advantage=column([row.advantages for row in rows], torch.float32),
        weight=shares[:, None] * mask,
    )
