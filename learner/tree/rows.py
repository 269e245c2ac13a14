"""Rows of tokens made of scored trees: one row a distinct trajectory.

Shapes: N nodes of a tree, B rows, S prompt and completion tokens, T generated tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.config import LearnerConfig
from learner.tree.training import TrainingTree, tree_advantages


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
    weight: float
    """What each of its tokens counts in the batch's loss."""
    repeated: int
    """The number of its first tokens that lie on an earlier row of the tree too."""


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


def tree_rows(training_tree: TrainingTree, config: LearnerConfig) -> list[Row]:
    """A row for each node with which trajectories end."""
    tree = training_tree.tree
    advantages = tree_advantages(tree, config).tolist()
    weights = (training_tree.weight_N * training_tree.scale).tolist()
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
                nodes=tuple(training_tree.first + n for n in path for _ in tree.steps[n].token_ids),
                advantages=tuple(advantages[n] for n in path for _ in tree.steps[n].token_ids),
                weight=weights[end],
                repeated=sum(len(tree.steps[n].token_ids) for n in path if n in seen),
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
    repeated = torch.tensor([row.repeated for row in rows], device=device)
    index = torch.arange(width, device=device)[None, :]
    mask = (index < lengths[:, None]).float()
    weights = torch.tensor([row.weight for row in rows], dtype=torch.float64, device=device)
    return Rows(
        ids=torch.tensor([ids(row) for row in rows], device=device),
        ids_mask=(torch.arange(wide, device=device)[None, :] < totals[:, None]).long(),
        prompt_lengths=torch.tensor([len(row.prompt) for row in rows], device=device),
        mask=mask,
        counted=mask * (index >= repeated[:, None]),
        old_logp=column([row.logprobs for row in rows], torch.float64),
        versions=column([row.versions for row in rows], torch.int64),
        node=column([row.nodes for row in rows], torch.int64),
        advantage=column([row.advantages for row in rows], torch.float64),
        weight=weights[:, None] * mask,
    )
