"""The learning rate: linear warm-up, then constant."""

from __future__ import annotations


def learning_rate(peak: float, updates: int, warmup_steps: int) -> float:
    """Rate of the optimiser step after `updates` others: peak (updates + 1) / warmup_steps, at most
    `peak`."""
    return peak * min((updates + 1) / max(warmup_steps, 1), 1.0)
