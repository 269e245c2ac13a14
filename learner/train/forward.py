"""Two ways through the model: packed trees, each token once, or a row for each trajectory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ibtree.tree import Tree
from learner.config import LearnerConfig
from learner.train.model import checkpoint_activations, packed_logprobs, token_logprobs
from learner.tree.attention import BLOCK, FlexTreeAttention, SegmentAttention, TreeAttention
from learner.tree.pack import Pack, Piece, drafts, packs, padded
from learner.tree.prepared import PreparedTrees
from learner.tree.probe import enable_packed_attention
from learner.tree.rows import Rows, pad, split_rows, tree_rows
from learner.tree.training import LossWeights, TrainingTree

BUCKETS = 8
"""Lengths that packs on the GPU are padded to: FlexAttention is compiled for each."""


class Batch(Protocol):
    """A micro-batch: what enters the loss beside the log-probabilities, all of their shape."""

    @property
    def counted(self) -> Tensor: ...
    @property
    def old_logp(self) -> Tensor: ...
    @property
    def versions(self) -> Tensor: ...
    @property
    def node(self) -> Tensor:
        """The number of the token's step among the nodes of the batch's trees."""
        ...

    @property
    def advantage(self) -> Tensor: ...
    @property
    def weight(self) -> Tensor: ...


class Forward(Protocol):
    """Cuts trees into micro-batches and gives their tokens' log-probabilities under a model."""

    def prepare(self, tree: Tree) -> None:
        """Does what can be done before the tree's batch is complete; leaving it out is no fault."""
        ...

    def batches(self, trees: Sequence[TrainingTree]) -> Iterator[Any]: ...
    def logprobs(self, model: Any, batch: Any) -> Tensor: ...


@dataclass(frozen=True)
class PackedBatch(Pack):
    """A pack on the device with its attention."""

    attention: TreeAttention


class PackedForward:
    """One pass over the unique tokens; several trees in a sequence, large ones in parts."""

    def __init__(
        self,
        models: Sequence[Any],
        config: LearnerConfig,
        device: torch.device,
        loss_weights: Callable[[Tree], LossWeights],
    ) -> None:
        for model in models:
            enable_packed_attention(model)
            # a method of the model: FSDP gathers its weights around methods alone
            model.packed_logprobs = partial(packed_logprobs, model)
        self._config, self._device = config, device
        self._drafts = PreparedTrees(lambda tree: drafts(tree, loss_weights(tree).weight_N, config))

    def prepare(self, tree: Tree) -> None:
        self._drafts.prepare(tree)

    def batches(self, trees: Sequence[TrainingTree]) -> Iterator[PackedBatch]:
        """Packs of at most `micro_batch_tokens` (one trajectory always fits)."""
        limit = self._config.micro_batch_tokens
        pieces = [
            Piece(draft, training_tree)
            for training_tree in trees
            for draft in self._drafts(training_tree.tree)
        ]
        for pack in packs(pieces, limit):
            attention: TreeAttention
            if self._device.type == "cuda":
                pack = padded(pack, bucket(len(pack.ids), limit)).to(self._device)
                attention = FlexTreeAttention(pack.last)
            else:
                attention = SegmentAttention(pack.predecessor, pack.position)
            yield PackedBatch(**vars(pack), attention=attention)

    def logprobs(self, model: Any, batch: PackedBatch) -> Tensor:
        """Log-probabilities of the tokens with a term in the loss, [T]."""
        logp: Tensor = model.packed_logprobs(
            batch,
            batch.attention,
            temperature=self._config.temperature,
            chunk=self._config.logits_chunk_tokens,
        )
        return logp


class TrajectoryForward:
    """A padded row for each distinct trajectory: slow, and works with any causal model."""

    def __init__(self, config: LearnerConfig, device: torch.device) -> None:
        self._config, self._device = config, device

    def prepare(self, tree: Tree) -> None:
        """Rows are made batch by batch."""

    def batches(self, trees: Sequence[TrainingTree]) -> Iterator[Rows]:
        """Rows of at most `micro_batch_tokens` together, padding included (one always fits)."""
        rows = [row for tree in trees for row in tree_rows(tree, self._config)]
        for part in split_rows(rows, self._config.micro_batch_tokens):
            yield pad(part, self._device)

    def logprobs(self, model: Any, batch: Rows) -> Tensor:
        """Log-probabilities of the generated tokens, [B, T]; 0 at padding."""
        return token_logprobs(
            model,
            batch.ids,
            batch.ids_mask,
            batch.prompt_lengths,
            batch.mask.shape[1],
            temperature=self._config.temperature,
            chunk=self._config.logits_chunk_tokens,
        )


def forward_of(
    config: LearnerConfig,
    policy: Any,
    reference: Any | None,
    device: torch.device,
    loss_weights: Callable[[Tree], LossWeights],
) -> Forward:
    """What `--forward` names; `loss_weights` as loss_weights_of. Raises FieldError for a model
    that packed trees do not fit."""
    if config.activation_checkpointing:
        checkpoint_activations(policy)
    if config.forward == "trajectory":
        return TrajectoryForward(config, device)
    models = [policy] if reference is None else [policy, reference]
    return PackedForward(models, config, device, loss_weights)


def bucket(tokens: int, limit: int) -> int:
    """The length a pack of so many tokens is padded to: one of BUCKETS up to `limit`, or further
    multiples of the smallest for a trajectory that is longer."""
    unit = -(-limit // (BUCKETS * BLOCK)) * BLOCK
    return -(-tokens // unit) * unit
