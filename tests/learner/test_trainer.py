"""Trainer.step as a whole: loss and gradient by hand, micro-batches, padding, trees left out."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from learner.batch import pad, split_rows
from learner.trainer import Trainer
from tests.learner.tiny import (
    CPU,
    Bigram,
    bigram_policy,
    causal_lm,
    config,
    flat_tree,
    mixed_batch,
    rows_of,
    settings_of,
)
from tests.reference import slow_loss

PROMPT = (7, 8)
TEMPERATURE = 0.7
OPTIONS = [
    {"length_norm": "trajectory", "old_logprobs": "trainer", "importance_cap": 1.1},
    {"length_norm": "token", "trajectory_weight": "draws", "skip_uniform_trees": False},
    {"length_norm": "constant", "max_new_tokens": 20},
    {"length_norm": "trajectory", "uniform_in_denominator": True},
]


def stepped(policy: nn.Module, reference: nn.Module | None, trees: list, **options):
    """Figures of one step whose gradients, left in the policy, are not clipped."""
    chosen = config(**{"grad_clip": 1e9, "lr": 1e-3, "temperature": TEMPERATURE, **options})
    return Trainer(policy, reference, chosen, CPU).step(trees, version=1), chosen


def gradients(policy: nn.Module) -> torch.Tensor:
    return torch.cat([weight.grad.flatten() for weight in policy.parameters()])


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: o["length_norm"])
def test_a_step_takes_the_loss_and_gradient_of_the_definitions(options):
    rng = random.Random(str(options))
    pairs = mixed_batch(rng)
    policy, reference = Bigram(9, seed=1), Bigram(9, seed=2)
    table, fixed = policy.table.tolist(), reference.table.tolist()
    trees = [pair.fast for pair in pairs]
    options = {"forward": "trajectory", "kl_weight": 0.04, **options}
    figures, chosen = stepped(policy, reference, trees, **options)

    setting, slow_trees = settings_of(chosen), [pair.slow for pair in pairs]
    in_trainer = chosen.old_logprobs == "trainer"
    old = bigram_policy([list(row) for row in table], TEMPERATURE) if in_trainer else None

    def slow() -> float:
        now, frozen = bigram_policy(table, TEMPERATURE), bigram_policy(fixed, TEMPERATURE)
        return slow_loss.loss(slow_trees, PROMPT, setting, now, old, frozen)

    assert figures.loss == pytest.approx(slow(), abs=1e-5)
    step = 1e-4
    for before, token in [(8, 0), (8, 2), (0, 1), (2, 2), (1, 5), (3, 0)]:
        middle, ends = table[before][token], []
        for shift in (step, -step):
            table[before][token] = middle + shift
            ends.append(slow())
        table[before][token] = middle
        want = (ends[0] - ends[1]) / (2 * step)
        assert float(policy.table.grad[before, token]) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("forward", ["packed", "trajectory"])
@pytest.mark.parametrize("length_norm", ["trajectory", "token"])
def test_micro_batches_change_neither_loss_nor_gradient(length_norm, forward):
    trees = [pair.fast for seed in range(2) for pair in mixed_batch(random.Random(seed))]
    found = []
    for tokens in (1, 30, 100_000):
        policy = causal_lm()
        options = {"forward": forward, "length_norm": length_norm, "micro_batch_tokens": tokens}
        figures, _ = stepped(policy, causal_lm(seed=1), trees, **options)
        found.append((figures, gradients(policy)))
    whole, gradient = found[-1]
    assert gradient.norm() > 1e-3
    for figures, part in found[:-1]:
        assert figures.means() == pytest.approx(whole.means(), rel=1e-4, nan_ok=True)
        assert (part - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("limit", [1, 12, 40, 10_000])
def test_split_rows_keeps_every_row_and_the_limit(limit):
    rows = rows_of([pair.fast for pair in mixed_batch(random.Random(5))], config())
    parts = list(split_rows(rows, limit))
    assert sorted(repr(row) for part in parts for row in part) == sorted(map(repr, rows))
    for part in parts:
        widest = max(len(row.prompt) + len(row.token_ids) for row in part)
        assert len(part) == 1 or len(part) * widest <= limit


def test_pad_holds_each_row_and_zeros():
    """Tensors of the rows; prompts of different lengths."""
    rows = rows_of([mixed_batch(random.Random(3))[0].fast], config())
    rows[0] = replace(rows[0], prompt=(1, 2, 3, 4))
    out = pad(rows, CPU)
    for b, row in enumerate(rows):
        ids, n, total = [*row.prompt, *row.token_ids], len(row.token_ids), out.ids.shape[1]
        assert out.ids[b].tolist() == ids + [0] * (total - len(ids))
        assert out.ids_mask[b].tolist() == [1] * len(ids) + [0] * (total - len(ids))
        assert int(out.prompt_lengths[b]) == len(row.prompt)
        for column, values in [
            (out.mask, [1.0] * n),
            (out.counted, [0.0] * row.shared + [1.0] * (n - row.shared)),
            (out.old_logp, row.logprobs),
            (out.versions, row.versions),
            (out.advantage, row.advantages),
            (out.weight, [row.share] * n),
        ]:
            assert column[b, :n].tolist() == pytest.approx(list(values), rel=1e-6)
            assert not column[b, n:].any()


def test_padding_contributes_nothing(monkeypatch):
    trees = [pair.fast for pair in mixed_batch(random.Random(4))]
    found = []
    for filler in (0, 5, 39):

        def filled(rows, device, filler=filler):
            out = pad(rows, device)
            return replace(out, ids=torch.where(out.ids_mask == 1, out.ids, filler))

        monkeypatch.setattr("learner.forward.pad", filled)
        policy = causal_lm()
        figures, _ = stepped(policy, causal_lm(seed=1), trees, forward="trajectory")
        found.append((figures.loss, gradients(policy)))
    for loss, gradient in found[1:]:
        assert loss == found[0][0]
        assert torch.equal(gradient, found[0][1])


def test_uniform_trees_alone_move_nothing():
    policy = Bigram(9, seed=1)
    before = policy.table.detach().clone()
    trainer = Trainer(policy, None, config(forward="trajectory"), CPU)
    figures = trainer.step([flat_tree([((1,), 1.0), ((2, 3), 1.0)])], version=1)
    assert (figures.trained_trees, figures.loss, figures.tokens) == (0, 0.0, 0.0)
    assert torch.equal(policy.table, before) and not trainer.optimizer.state


def test_a_step_without_a_finite_gradient_is_left_out():
    policy = Bigram(9, seed=1)
    with torch.no_grad():
        policy.table[8, 1] = float("nan")
    before = policy.table.detach().clone()
    trees = [flat_tree([((1,), 1.0), ((2, 3), 0.0)])]
    stepped(policy, None, trees, forward="trajectory")
    assert torch.equal(policy.table.nan_to_num(99.0), before.nan_to_num(99.0))


def test_figures_of_a_step():
    """Two trajectories of 1 and 2 tokens; only tokens of the trainer's version enter the gap."""
    tree = flat_tree([((1,), 1.0), ((2, 3), 0.0)])
    tree.steps[2] = replace(tree.steps[2], versions=(4, 3), logprobs=(-0.5, -40.0))
    policy = Bigram(9, seed=1)
    logp = bigram_policy(policy.table.tolist(), 1.0)
    chosen = config(forward="trajectory", temperature=1.0, grad_clip=1e-3)
    figures = Trainer(policy, None, chosen, CPU).step([tree], 4)
    gap = abs(logp(PROMPT, (2,)) + 0.5)
    assert figures.means() == pytest.approx(
        figures.means()
        | {"log_prob_gap_mean": gap, "log_prob_gap_max": gap, "trained_trees": 1, "kl": 0.0},
        rel=1e-5,
    )
    assert figures.tokens == 3.0 and figures.grad_norm > 1e-3
    assert gradients(policy).norm() == pytest.approx(1e-3, rel=1e-3)
    other = Trainer(policy, None, config(forward="trajectory"), CPU).step([tree], version=9).means()
    assert other["log_prob_gap_mean"] != other["log_prob_gap_mean"]  # NaN: no token of version 9
