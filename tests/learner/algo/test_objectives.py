"""Loss and gradient of the learner's terms and rows against the slow reference, in float64."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from learner.algo.objectives import (
    token_objective,
    token_weights,
    truncated_importance,
    weighted_loss,
)
from learner.config import LearnerConfig
from learner.tree.rows import Row
from tests.ibtree.tree.growing import Pair
from tests.learner.tiny import config, mixed_batch, rows_of, settings_of
from tests.reference import slow_loss

PROMPT = (7, 8)
OPTIONS = [
    {},
    {"trajectory_weight": "draws", "value_estimator": "backup"},
    {"length_norm": "token", "clip_low": 0.1, "clip_high": 0.4},
    {"length_norm": "token", "trajectory_weight": "draws", "kl_weight": 0.5},
    {"length_norm": "constant", "max_new_tokens": 33, "std": "sample", "advantage_eps": 1e-4},
    {"length_norm": "constant", "trajectory_weight": "draws", "confidence": "product"},
    {"skip_uniform_trees": False, "local_weight": 1.0, "local_scale": "step"},
    {"skip_uniform_trees": False, "length_norm": "token", "kl_weight": 0.0},
    {"uniform_in_denominator": True, "confidence": "sibling"},
    {"old_logprobs": "trainer", "importance_cap": 1.3, "kl_weight": 0.04},
]


class Table:
    """A policy that is a random table from a token's whole context to its ln-probability."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.known: dict[tuple[int, ...], float] = {}

    def __call__(self, prompt: tuple[int, ...], sofar: tuple[int, ...]) -> float:
        assert prompt == PROMPT
        return self.known.setdefault(sofar, -self._rng.uniform(0.05, 2.5))

    def of(self, rows: list[Row]) -> torch.Tensor:
        return doubles([[self(PROMPT, sofar) for sofar in contexts(row)] for row in rows])


def contexts(row: Row) -> list[tuple[int, ...]]:
    return [row.token_ids[: t + 1] for t in range(len(row.token_ids))]


def doubles(values: list[list[float]]) -> torch.Tensor:
    wide = max(map(len, values))
    return torch.tensor([[*v, *[0.0] * (wide - len(v))] for v in values], dtype=torch.float64)


def fast_rows(pairs: list[Pair], chosen: LearnerConfig) -> list[Row]:
    return rows_of([pair.fast for pair in pairs], chosen)


def fast_loss(
    rows: list[Row], chosen: LearnerConfig, policy: Table, old: Table, reference: Table
) -> tuple[float, dict[tuple[int, ...], float]]:
    """Loss, and its gradient by context (the entries of rows that share one add up)."""
    logp = policy.of(rows).requires_grad_()
    engine = doubles([list(row.logprobs) for row in rows])
    in_trainer = chosen.old_logprobs == "trainer"
    objective = token_objective(
        logp,
        old.of(rows) if in_trainer else engine,
        doubles([list(row.advantages) for row in rows]),
        clip_low=chosen.clip_low,
        clip_high=chosen.clip_high,
        ref_logp=reference.of(rows),
        correction=truncated_importance(old.of(rows), engine, chosen.importance_cap)
        if in_trainer
        else None,
    )
    weight = doubles([[row.weight] * len(row.token_ids) for row in rows])
    loss = weighted_loss(objective, weight, chosen.kl_weight)
    loss.backward()
    slopes: dict[tuple[int, ...], float] = {}
    for row, slope in zip(rows, logp.grad.tolist(), strict=True):
        for sofar, part in zip(contexts(row), slope, strict=False):
            slopes[sofar] = slopes.get(sofar, 0.0) + part
    return float(loss.detach()), slopes


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradient_match_the_definitions(seed, options):
    rng, ratio = random.Random(f"{seed}/{options}"), float(seed % 2)
    pairs, chosen = mixed_batch(rng, ratio), config(**options)
    policy, old, reference = Table(rng), Table(rng), Table(rng)
    loss, slopes = fast_loss(fast_rows(pairs, chosen), chosen, policy, old, reference)

    def slow() -> float:
        old_policy = old if chosen.old_logprobs == "trainer" else None
        trees, setting = [pair.slow for pair in pairs], settings_of(chosen, ratio)
        return slow_loss.loss(trees, PROMPT, setting, policy, old_policy, reference)

    assert math.isclose(loss, slow(), rel_tol=1e-9, abs_tol=1e-9)
    step = 1e-5
    for sofar in rng.sample(sorted(slopes), min(3, len(slopes))):
        middle, ends = policy.known[sofar], []
        for shift in (step, -step):
            policy.known[sofar] = middle + shift
            ends.append(slow())
        policy.known[sofar] = middle
        assert math.isclose((ends[0] - ends[1]) / (2 * step), slopes[sofar], abs_tol=1e-8)


@pytest.mark.parametrize("length_norm", ["token", "constant"])
def test_uniform_trees_stay_in_the_denominator_of_every_normalisation(length_norm):
    rng = random.Random(length_norm)
    chosen = config(length_norm=length_norm, uniform_in_denominator=True)
    pairs, policy, reference = mixed_batch(rng), Table(rng), Table(rng)
    loss, _ = fast_loss(fast_rows(pairs, chosen), chosen, policy, policy, reference)
    trees, setting = [pair.slow for pair in pairs], settings_of(chosen)
    want = slow_loss.loss(trees, PROMPT, setting, policy, None, reference)
    assert math.isclose(loss, want, rel_tol=1e-9)


@pytest.mark.parametrize(
    ("ratio", "advantage", "term", "slope"),
    [
        (1.5, 1.0, 1.28, 0.0),  # up and good: held at 1 + 0.28
        (1.2, 1.0, 1.2, 1.2),
        (1.5, -1.0, -1.5, -1.5),  # up and bad: never held
        (0.5, 1.0, 0.5, 0.5),  # down and good: never held
        (0.5, -1.0, -0.9, 0.0),  # down and bad: held at 1 - 0.1
        (0.95, -1.0, -0.95, -0.95),
        (3.0, 0.0, 0.0, 0.0),
    ],
)
def test_each_side_is_clipped_at_its_own_bound(ratio, advantage, term, slope):
    logp = torch.tensor([[math.log(ratio) - 2.0]], dtype=torch.float64, requires_grad=True)
    old, a = torch.full_like(logp, -2.0).detach(), torch.full_like(logp, advantage).detach()
    objective = token_objective(logp, old, a, clip_low=0.1, clip_high=0.28)
    objective.surrogate.sum().backward()
    assert objective.surrogate.item() == pytest.approx(term)
    assert float(logp.grad) == pytest.approx(slope)
    assert bool(objective.clipped) == (advantage != 0 and slope == 0)
    assert float(objective.kl) == 0.0


def test_importance_weights_are_capped_and_carry_no_gradient():
    trainer = torch.tensor([-1.0, -1.0, -3.0], requires_grad=True)
    weight = truncated_importance(trainer, torch.tensor([-1.5, -3.0, -1.0]), 2.0)
    assert weight.tolist() == pytest.approx([math.exp(0.5), 2.0, math.exp(-2.0)])
    assert not weight.requires_grad


def test_kl_is_zero_at_the_reference_and_positive_elsewhere():
    logp = torch.tensor([[-1.0, -2.0, -0.1]], dtype=torch.float64)
    reference = torch.tensor([[-1.0, -1.0, -3.0]], dtype=torch.float64)
    a = torch.zeros_like(logp)
    kl = token_objective(logp, logp, a, clip_low=0.2, clip_high=0.2, ref_logp=reference).kl
    assert kl[0].tolist() == pytest.approx([0.0, math.e - 2, math.exp(-2.9) + 1.9])


def test_what_the_normalisations_add_up_to():
    """Trajectories of 1, 3 and 4 tokens: a tree of two (one a twin, G = 3) and a tree of one."""
    trees = [(np.array([1, 3]), np.array([2 / 3, 1 / 3]), 3), (np.array([4]), np.array([1.0]), 1)]
    tokens = 2 * 1 + 3 + 4
    for how, want in [
        ("trajectory", [2 / 3 / 2, 1 / 3 / 3 / 2, 1 / 4 / 2]),
        ("token", [2 / tokens, 1 / tokens, 1 / tokens]),
        ("constant", [2 / 40, 1 / 40, 1 / 40]),
    ]:
        per_tree = [token_weights(*tree, length_norm=how, constant_tokens=10) for tree in trees]
        normalizer = sum(weights.normalizer for weights in per_tree)
        per_token = np.concatenate([weights.weight_B for weights in per_tree]) / normalizer
        assert per_token.tolist() == pytest.approx(want)
    with pytest.raises(ValueError, match="length_norm"):
        token_weights(*trees[0], length_norm="mean")
