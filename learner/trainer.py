"""The optimiser steps on a batch of scored trees."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ibtree.tree import Tree
from learner.batch import trained_trees
from learner.config import LearnerConfig
from learner.forward import Batch, forward_of
from learner.math.loss import token_objective, truncated_importance, weighted_loss
from learner.math.schedule import learning_rate


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
        """Log-probability gap [nats] over tokens of the trainer's own version: NaN without any."""
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


class Trainer:
    """Policy, optional frozen reference and optimiser on one device."""

    def __init__(
        self, policy: Any, reference: Any | None, config: LearnerConfig, device: torch.device
    ) -> None:
        self.policy, self._reference = policy, reference
        self._config, self._forward = config, forward_of(config, policy, reference, device)
        self.optimizer = torch.optim.AdamW(
            policy.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.95)
        )

    def step(self, trees: list[Tree], version: int, updates: int = 0) -> StepFigures:
        """`optimizer_steps_per_batch` optimiser steps, each on all the trees with reward variance
        (all, if uniform trees are not skipped).

        `version` is the weight version the policy has now, `updates` the optimiser steps before.
        Without a tree left, or a finite loss and gradient, the weights stay.
        """
        config, figures = self._config, StepFigures()
        trained = trained_trees(trees, config)
        figures.trained_trees = len(trained)
        if not trained:
            return figures
        parts = list(self._forward.batches(trained))
        before: list[Tensor | None] = [None] * len(parts)
        for _ in range(config.optimizer_steps_per_batch):
            self.optimizer.zero_grad(set_to_none=True)
            loss = 0.0
            for i, part in enumerate(parts):
                part_loss, before[i] = self._backward(part, before[i], version, figures)
                loss += part_loss
            figures.lr = learning_rate(config.lr, updates + figures.updates, config.warmup_steps)
            if not self._update(loss, figures):
                break
        return figures

    def _update(self, loss: float, figures: StepFigures) -> bool:
        """Takes the optimiser step, unless loss or gradient are not finite."""
        with figures.computing():
            norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self._config.grad_clip)
            figures.grad_norm = float(norm)
            figures.loss += loss
            figures.passes += 1
            figures.bad = not math.isfinite(loss + figures.grad_norm)
            if not figures.bad:
                for group in self.optimizer.param_groups:
                    group["lr"] = figures.lr
                self.optimizer.step()
                figures.updates += 1
        return not figures.bad

    def _backward(
        self, batch: Batch, before: Tensor | None, version: int, figures: StepFigures
    ) -> tuple[float, Tensor]:
        """Adds the part's gradient; returns its loss and the policy's log-probabilities `before`
        the batch's first update, None in the first pass: they are this one's."""
        with figures.computing():
            logp = self._forward.logprobs(self.policy, batch)
            reference = None
            if self._reference is not None:
                with torch.no_grad():
                    reference = self._forward.logprobs(self._reference, batch)
            before = logp.detach() if before is None else before
            old, correction = batch.old_logp, None
            if self._config.old_logprobs == "trainer":
                old = before
                cap = self._config.importance_cap
                correction = truncated_importance(old, batch.old_logp, cap)
            objective = token_objective(
                logp,
                old,
                batch.advantage,
                clip_low=self._config.clip_low,
                clip_high=self._config.clip_high,
                ref_logp=reference,
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
            gap = (before - batch.old_logp).abs()[own]
            figures.gap_sum += float(gap.sum())
            figures.gap_max = max(figures.gap_max, float(gap.max()))
            figures.gap_tokens += gap.numel()
        return loss, before
