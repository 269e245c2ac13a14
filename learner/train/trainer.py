"""The optimiser steps on a batch of scored trees."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ibtree.tree import Tree
from learner.algo.objectives import token_objective, truncated_importance, weighted_loss
from learner.algo.schedule import learning_rate
from learner.config import LearnerConfig
from learner.dist.fsdp import shard, whole
from learner.dist.process_group import ALONE, Ranks
from learner.train.forward import Batch, forward_of
from learner.train.precision import compute_dtype, computing_in
from learner.train.reference import by_reference
from learner.tree.prepared import PreparedTrees
from learner.tree.training import TrainingTree, loss_weights_of, training_trees


@dataclass
class StepFigures:
    """Sums over the trees' tokens, each counted once, and passes; the means are what is reported.

    `updates` optimiser steps were taken, the last one at rate `lr`; the batch is `bad` if one was
    skipped for want of a finite loss and gradient, which `grad_norm` and `loss` then show.
    """

    loss: float = 0.0
    kl: float = 0.0
    clipped: float = 0.0
    tokens: float = 0.0
    gap_sum: float = 0.0
    gap_max: float = 0.0
    gap_tokens: float = 0.0
    grad_norm: float = 0.0
    trained_trees: int = 0
    updates: int = 0
    passes: int = 0
    lr: float = 0.0
    bad: bool = False
    seconds_compute: float = 0.0

    def means(self) -> dict[str, float]:
        """What is reported; the log-probability gap [nats] is over tokens of the trainer's own
        version, NaN without any."""
        tokens, gap_tokens = max(self.tokens, 1.0), self.gap_tokens
        return {
            "loss": self.loss / max(self.passes, 1),
            "kl": self.kl / tokens,
            "clip_share": self.clipped / tokens,
            "grad_norm": self.grad_norm,
            "log_prob_gap_mean": self.gap_sum / gap_tokens if gap_tokens else float("nan"),
            "log_prob_gap_max": self.gap_max if gap_tokens else float("nan"),
            "trained_trees": self.trained_trees,
            "updates": self.updates,
            "lr": self.lr,
        }

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Adds the seconds inside to those of forward, backward and optimiser."""
        begin = time.monotonic()
        yield
        self.seconds_compute += time.monotonic() - begin


@dataclass
class _Pass:
    """A micro-batch on its way through the models, and what is kept of it between updates."""

    batch: Batch
    idle: bool
    """True if it only makes this rank pass through the layers as often as the others."""
    reference: Tensor | None
    """The frozen reference's log-probabilities, if there is one."""
    before: Tensor | None = None
    """The policy's before the batch's first update."""


class Trainer:
    """Policy, optional frozen reference and optimiser, on one device or spread over the ranks."""

    def __init__(
        self,
        policy: Any,
        reference: Any | None,
        config: LearnerConfig,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        self.policy, self._reference = policy, reference
        self._config = config
        self._loss_weights = PreparedTrees(partial(loss_weights_of, config=config))
        self._forward = forward_of(config, policy, reference, device, self._loss_weights)
        self._ranks = ranks
        compute = compute_dtype(config)
        shard(policy, ranks, compute, trained=True)
        if reference is not None:
            shard(reference, ranks, compute, trained=False)
        self._compute_dtype = None if ranks.mesh else compute  # shards compute in it as they are
        self.optimizer = torch.optim.AdamW(
            policy.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.95)
        )

    def prepare(self, tree: Tree) -> None:
        """Packs a tree that is to be trained on ahead of its step, while others still grow; on
        several ranks each packs its own share in the step."""
        self._loss_weights.prepare(tree)
        skipped = self._config.skip_uniform_trees and self._loss_weights(tree).uniform
        if self._ranks.size == 1 and not skipped:
            self._forward.prepare(tree)

    def step(self, trees: list[Tree], version: int, updates: int = 0) -> StepFigures:
        """`optimizer_steps_per_batch` optimiser steps, each on all the trees with reward variance
        (all, if uniform trees are not skipped).

        `version` is the weight version the policy has now, `updates` the optimiser steps before.
        Without a tree left, or a finite loss and gradient, the weights stay. All ranks take it at
        once, each with a share of the trees; what they decide by is the same on all.
        """
        training, figures = training_trees(trees, self._config, self._loss_weights), StepFigures()
        figures.trained_trees = len(training)
        if not training:
            return figures
        with self._ranks.together("step", trees, version=version, updates=updates):
            passes = self._passes(training, figures)
            for _ in range(self._config.optimizer_steps_per_batch):
                self.optimizer.zero_grad(set_to_none=True)
                with computing_in(self._compute_dtype, self.policy):
                    loss = sum(self._backward(pass_, version, figures) for pass_ in passes)
                if not self._update(loss, updates, figures):
                    break
            self._add_up(figures)
        return figures

    def _passes(self, training: list[TrainingTree], figures: StepFigures) -> list[_Pass]:
        """This rank's passes, as many as on any other."""
        sizes = [len(t.tree.prompt) + t.tree.unique_tokens for t in training]
        own = [training[i] for i in self._ranks.assigned(sizes)]
        batches = list(self._forward.batches(own))
        missing = round(self._ranks.most(len(batches))) - len(batches)
        smallest = training[sizes.index(min(sizes))]
        spare = [next(iter(self._forward.batches([smallest])))] * missing if missing else []
        references: list[Any] = [self._frozen(batch, figures) for batch in (*batches, *spare)]
        if self._config.local_reference == "reference":
            batches = by_reference(batches, references[: len(batches)], own, self._config)
        idle = [False] * len(batches) + [True] * len(spare)
        columns = ((*batches, *spare), idle, references)
        return [_Pass(*row) for row in zip(*columns, strict=True)]

    def _frozen(self, batch: Batch, figures: StepFigures) -> Tensor | None:
        """The reference's log-probabilities; None without one."""
        if self._reference is None:
            return None
        # loaded in that dtype it needs no copies
        precision = computing_in(self._compute_dtype, self._reference)
        with figures.computing(), torch.no_grad(), precision:
            return self._forward.logprobs(self._reference, batch)

    def _update(self, loss: float, updates: int, figures: StepFigures) -> bool:
        """Takes the optimiser step, unless loss or gradient are not finite."""
        with figures.computing():
            (loss,) = self._ranks.sum([loss])
            norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self._config.grad_clip)
            figures.grad_norm = float(whole(norm))
            figures.loss += loss
            figures.passes += 1
            figures.bad = not math.isfinite(loss + figures.grad_norm)
            done = updates + figures.updates
            figures.lr = learning_rate(self._config.lr, done, self._config.warmup_steps)
            if not figures.bad:
                for group in self.optimizer.param_groups:
                    group["lr"] = figures.lr
                self.optimizer.step()
                figures.updates += 1
        return not figures.bad

    def _backward(self, pass_: _Pass, version: int, figures: StepFigures) -> float:
        """Adds the pass's gradient; returns its loss."""
        batch = pass_.batch
        with figures.computing():
            logp = self._forward.logprobs(self.policy, batch)
            if pass_.idle:
                (logp.sum() * 0.0).backward()  # type: ignore[no-untyped-call]
                return 0.0
            pass_.before = logp.detach() if pass_.before is None else pass_.before
            old, correction = batch.old_logp, None
            if self._config.old_logprobs == "trainer":
                old = pass_.before
                cap = self._config.importance_cap
                correction = truncated_importance(old, batch.old_logp, cap)
            objective = token_objective(
                logp,
                old,
                batch.advantage,
                clip_low=self._config.clip_low,
                clip_high=self._config.clip_high,
                ref_logp=pass_.reference,
                correction=correction,
            )
            total = weighted_loss(objective, batch.weight, self._config.kl_weight)
            total.backward()  # type: ignore[no-untyped-call]
            loss = float(total.detach())  # waits for the device

        counted = batch.counted
        figures.kl += float((objective.kl.detach() * counted).sum())
        figures.clipped += float((objective.clipped * counted).sum())
        figures.tokens += float(counted.sum())
        own = (batch.versions == version) & (counted > 0)
        if own.any():
            gap = (pass_.before - batch.old_logp).abs()[own]
            figures.gap_sum += float(gap.sum())
            figures.gap_max = max(figures.gap_max, float(gap.max()))
            figures.gap_tokens += gap.numel()
        return loss

    def _add_up(self, figures: StepFigures) -> None:
        """What each rank counted becomes what all counted; loss and gradient are that already."""
        names = ("kl", "clipped", "tokens", "gap_sum", "gap_tokens")
        totals = self._ranks.sum([getattr(figures, name) for name in names])
        for name, total in zip(names, totals, strict=True):
            setattr(figures, name, total)
        figures.gap_max = self._ranks.most(figures.gap_max)
