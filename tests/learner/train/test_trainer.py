"""Trainer.step as a whole: loss and gradient by hand, micro-batches, padding, trees left out."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from ibtree.tree import Tree
from learner.algo.schedule import learning_rate
from learner.train.trainer import Trainer
from learner.tree.rows import pad, split_rows
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
from tests.reference.slow_loss import Policy

PROMPT = (7, 8)
TEMPERATURE = 0.7
BY_REFERENCE = {"local_reference": "reference", "local_weight": 2.0, "micro_batch_tokens": 20}
OPTIONS = [
    {"length_norm": "trajectory", "old_logprobs": "trainer", "importance_cap": 1.1},
    {"length_norm": "token", "trajectory_weight": "draws", "skip_uniform_trees": False},
    {"length_norm": "constant", "max_new_tokens": 20},
    {"length_norm": "trajectory", "uniform_in_denominator": True},
    {"length_norm": "token", **BY_REFERENCE},
    {"length_norm": "constant", "confidence": "sibling", "kl_weight": 0.0, **BY_REFERENCE},
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
    outcomes = []
    for tokens in (1, 30, 100_000):
        policy = causal_lm()
        options = {"forward": forward, "length_norm": length_norm, "micro_batch_tokens": tokens}
        figures, _ = stepped(policy, causal_lm(seed=1), trees, **options)
        outcomes.append((figures, gradients(policy)))
    whole, gradient = outcomes[-1]
    assert gradient.norm() > 1e-3
    for figures, part in outcomes[:-1]:
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
            (out.counted, [0.0] * row.repeated + [1.0] * (n - row.repeated)),
            (out.old_logp, row.logprobs),
            (out.versions, row.versions),
            (out.advantage, row.advantages),
            (out.weight, [row.weight] * n),
        ]:
            assert column[b, :n].tolist() == pytest.approx(list(values), rel=1e-6)
            assert not column[b, n:].any()


def test_padding_contributes_nothing(monkeypatch):
    trees = [pair.fast for pair in mixed_batch(random.Random(4))]
    outcomes = []
    for filler in (0, 5, 39):

        def filled(rows, device, filler=filler):
            out = pad(rows, device)
            return replace(out, ids=torch.where(out.ids_mask == 1, out.ids, filler))

        monkeypatch.setattr("learner.train.forward.pad", filled)
        policy = causal_lm()
        figures, _ = stepped(policy, causal_lm(seed=1), trees, forward="trajectory")
        outcomes.append((figures.loss, gradients(policy)))
    for loss, gradient in outcomes[1:]:
        assert loss == outcomes[0][0]
        assert torch.equal(gradient, outcomes[0][1])


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


def skewed_trees() -> list[Tree]:
    return [pair.fast for pair in mixed_batch(random.Random(6))]


def test_a_bad_step_is_told_and_takes_no_optimiser_step():
    """An old log-probability so low that the ratio overflows where the advantage is negative."""
    trees = skewed_trees()
    policy = Bigram(9, seed=1)
    trainer = Trainer(policy, None, config(forward="trajectory", optimizer_steps_per_batch=3), CPU)
    bad = [replace(s, logprobs=(-1e4,) * len(s.token_ids)) for s in trees[0].steps[1:]]
    trees[0].steps[1:] = bad
    before = policy.table.detach().clone()
    figures = trainer.step(trees, version=1)
    assert figures.bad and (figures.updates, figures.passes) == (0, 1)
    assert torch.equal(policy.table, before) and not trainer.optimizer.state
    good = trainer.step(skewed_trees(), version=1)
    assert not good.bad and (good.updates, good.passes) == (3, 3)
    assert not torch.equal(policy.table, before)


@pytest.mark.parametrize("old", ["engine", "trainer"])
def test_several_updates_keep_the_old_log_probabilities(old):
    """The engine recorded what the policy says before the first update: then both kinds of old
    log-probabilities are the recorded ones, in every update, as in three steps by themselves."""
    options = {"lr": 0.05, "grad_clip": 1e9, "temperature": TEMPERATURE, "micro_batch_tokens": 30}
    options |= {"forward": "trajectory"}
    together, single = Bigram(9, seed=1), Bigram(9, seed=1)
    logp = bigram_policy(single.table.tolist(), TEMPERATURE)
    trees = [recorded_by(logp, tree) for tree in skewed_trees()]
    chosen = config(**options, old_logprobs=old, optimizer_steps_per_batch=3)
    figures = Trainer(together, None, chosen, CPU).step(trees, version=1)
    alone = Trainer(single, None, config(**options), CPU)
    steps = [alone.step(trees, version=1) for _ in range(3)]
    losses = [step.loss for step in steps]
    assert figures.means()["loss"] == pytest.approx(sum(losses) / 3, abs=1e-5)
    assert torch.allclose(together.table, single.table, atol=1e-6)
    assert len(set(losses)) == 3 and figures.updates == 3
    assert steps[0].clipped == 0 < figures.clipped == pytest.approx(sum(s.clipped for s in steps))


def recorded_by(logp: Policy, tree: Tree) -> Tree:
    """The tree with this policy's log-probabilities."""
    for node in range(1, len(tree)):
        ids, step = tree.prefix(node), tree.steps[node]
        ends = range(len(ids) - len(step.token_ids) + 1, len(ids) + 1)
        tree.steps[node] = replace(step, logprobs=tuple(logp(tree.prompt, ids[:e]) for e in ends))
    return tree


def test_the_gap_is_that_before_the_first_update():
    trees, gaps = skewed_trees(), []
    for updates in (1, 4):
        chosen = config(forward="trajectory", lr=0.1, optimizer_steps_per_batch=updates)
        figures = Trainer(Bigram(9, seed=1), None, chosen, CPU).step(trees, version=0)
        gaps.append([figures.means()[f"log_prob_gap_{kind}"] for kind in ("mean", "max")])
    assert gaps[0] == gaps[1] and gaps[0][0] > 0


def test_warm_up_rises_to_the_rate_and_stays():
    """Over optimiser steps, not batches. Adam's first step is of the size of the rate."""
    chosen = config(forward="trajectory", lr=0.08, warmup_steps=4, optimizer_steps_per_batch=2)
    trainer, rates, taken = Trainer(Bigram(9, seed=1), None, chosen, CPU), [], 0
    for _ in range(4):
        figures = trainer.step(skewed_trees(), version=1, updates=taken)
        taken += figures.updates
        rates.append(figures.lr)
    assert rates == pytest.approx([0.04, 0.08, 0.08, 0.08])
    assert [learning_rate(0.08, n, 4) for n in range(6)] == pytest.approx(
        [0.02, 0.04, 0.06, 0.08, 0.08, 0.08]
    )
    assert learning_rate(0.08, 0, 0) == 0.08
    small, whole = (Bigram(9, seed=1) for _ in range(2))
    for policy, warm in ((small, 4), (whole, 0)):
        chosen = config(forward="trajectory", lr=0.08, warmup_steps=warm)
        Trainer(policy, None, chosen, CPU).step(skewed_trees(), 1)
    start = Bigram(9, seed=1).table
    ratio = ((small.table - start).norm() / (whole.table - start).norm()).detach()
    assert float(ratio) == pytest.approx(0.25, rel=1e-4)


def test_seconds_of_computing_are_part_of_the_step():
    trainer = Trainer(causal_lm(), None, config(), CPU)
    begin = time.monotonic()
    figures = trainer.step(skewed_trees(), version=1)
    assert 0 < figures.seconds_compute < time.monotonic() - begin


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
