"""One optimiser step on a batch of scored trees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ibtree.tree import Tree
from learner.batch import trained_trees
from learner.config import LearnerConfig
from learner.forward import Batch, forward_of
from learner.math.loss import token_objective, truncated_importance, weighted_loss


@dataclass
class StepFigures:
    """Sums over the trees' tokens, each counted once; the means are what is reported."""

    loss: float = 0.0
    kl: float = 0.0
    clipped: float = 0.0
    tokens: float = 0.0
    gap_sum: float = 0.0
    gap_max: float = 0.0
    gap_tokens: float = 0.0
    grad_norm: float = 0.0
    trained_trees: int = 0

    def means(self) -> dict[str, float]:
        """Log-probability gap [nats] over tokens of the trainer's own version: NaN without any."""
        tokens, gap_tokens = max(self.tokens, 1.0), self.gap_tokens
        return {
            "loss": self.loss,
            "kl": self.kl / tokens,
            "clip_share": self.clipped / tokens,
            "grad_norm": self.grad_norm,
            "log_prob_gap_mean": self.gap_sum / gap_tokens if gap_tokens else float("nan"),
            "log_prob_gap_max": self.gap_max if gap_tokens else float("nan"),
            "trained_trees": self.trained_trees,
        }


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

    def step(self, trees: list[Tree], version: int) -> StepFigures:
        """One step on the trees with reward variance (all, if uniform trees are not skipped).

        `version` is the weight version the policy has now. Without a tree left the weights stay.
        """
        config, figures = self._config, StepFigures()
        trained = trained_trees(trees, config)
        figures.trained_trees = len(trained)
        if not trained:
            return figures
        self.optimizer.zero_grad(set_to_none=True)
        for batch in self._forward.batches(trained):
            self._backward(batch, version, figures)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), config.grad_clip)
        figures.grad_norm = float(norm)
        if torch.isfinite(norm):
            self.optimizer.step()
        return figures

    def _backward(self, batch: Batch, version: int, figures: StepFigures) -> None:
        logp = self._forward.logprobs(self.policy, batch)
        reference = None
        if self._reference is not None:
            with torch.no_grad():
                reference = self._forward.logprobs(self._reference, batch)
        old, correction = batch.old_logp, None
        if self._config.old_logprobs == "trainer":
            # one step a batch: the policy before the update is the policy of this forward pass
            old = logp.detach()
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
        loss = weighted_loss(objective, batch.weight, self._config.kl_weight)
        loss.backward()  # type: ignore[no-untyped-call]

        counted = batch.counted
        figures.loss += float(loss.detach())
        figures.kl += float((objective.kl.detach() * counted).sum())
        figures.clipped += float((objective.clipped * counted).sum())
        figures.tokens += float(counted.sum())
        own = (batch.versions == version) & (counted > 0)
        if own.any():
            gap = (logp.detach() - batch.old_logp).abs()[own]
            figures.gap_sum += float(gap.sum())
            figures.gap_max = max(figures.gap_max, float(gap.max()))
            figures.gap_tokens += gap.numel()
