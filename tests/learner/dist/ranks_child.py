"""Run by torchrun: steps by all ranks against the same steps by one process alone.

Rank 0 calls for them; the others follow, as in a run.
"""

from __future__ import annotations

import math
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ibtree.tree import Tree
from learner.dist.commands import Command
from learner.dist.fsdp import whole
from learner.dist.process_group import ALONE, Ranks, joined
from learner.dist.state import read_shards, weights_of, write_shards
from learner.train.trainer import StepFigures, Trainer
from tests.learner.tiny import CPU, causal_lm, config
from tests.learner.tree.test_layout import SHAPES, tree_of

TIMEOUT_S = 12
LONG_S = 1000
"""Gradients are gathered between commands here, where rank 0 must not say that it is there."""
TREES = [tree_of(shape) for shape in SHAPES if shape[0] < 20]
CASES: dict[str, dict[str, Any]] = {
    "several passes": {"micro_batch_tokens": 150},
    "token": {"length_norm": "token"},
    "constant": {"length_norm": "constant", "max_new_tokens": 50},
    "draws": {"trajectory_weight": "draws", "value_estimator": "backup", "local_scale": "step"},
    "uniform counted": {"uniform_in_denominator": True},
    "trainer": {"old_logprobs": "trainer", "optimizer_steps_per_batch": 3},
    "reference": {"local_reference": "reference", "local_weight": 1.0, "micro_batch_tokens": 150},
    "checkpointing": {"activation_checkpointing": True},
    "trajectory": {"forward": "trajectory", "micro_batch_tokens": 1000},
    "no reference": {"kl_weight": 0.0},
}


def new_trainer(ranks: Ranks, options: dict[str, Any]) -> Trainer:
    settings = {"lr": 1e-4, "kl_weight": 0.05, "temperature": 0.7, "grad_clip": 1e9, **options}
    policy, reference = (causal_lm("Qwen3", seed=seed) for seed in (1, 2))
    return Trainer(
        policy, reference if settings["kl_weight"] else None, config(**settings), CPU, ranks
    )


def stepped(
    trainer: Trainer, trees: list[Tree], commands: Iterator[Command] | None
) -> tuple[StepFigures, dict[str, Tensor]]:
    """Figures of a step, and the gradient that it leaves. Ranks that follow give `commands`."""
    if commands is None:
        figures = trainer.step(deepcopy(trees), version=1)
    else:
        command = next(commands)
        figures = trainer.step(command.trees, **command.facts)
    slopes = {name: whole(w.grad) for name, w in trainer.policy.named_parameters()}
    return figures, {name: slope.clone() for name, slope in slopes.items()}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def compare(ranks: Ranks, commands: Iterator[Command] | None) -> None:
    for name, options in CASES.items():
        alone, spread = new_trainer(ALONE, options), new_trainer(ranks, options)
        for trees in (TREES, TREES[2:3]):  # then fewer than ranks
            want, slope = stepped(alone, trees, None)
            figures, own_slope = stepped(spread, trees, commands)
            assert figures.means() == pytest.approx(want.means(), rel=1e-4, nan_ok=True), name
            assert want.loss != 0 and want.tokens > 0 and figures.updates == want.updates
            assert (flat(own_slope) - flat(slope)).norm() < 1e-4 * flat(slope).norm(), name
        print("same step:", name)


def skips_together(ranks: Ranks, commands: Iterator[Command] | None) -> None:
    """A gradient that is not finite on one rank alone leaves the weights on all."""
    spread = new_trainer(ranks, {"kl_weight": 0.0})
    before = [whole(w).clone() for w in spread.policy.parameters()]
    bad = deepcopy(TREES[3])
    bad.steps[1:] = [
        type(step)(step.token_ids, (-1e4,) * len(step.token_ids), step.versions)
        for step in bad.steps[1:]
    ]
    figures, _ = stepped(spread, [TREES[2], bad, TREES[4]], commands)
    assert figures.bad and not figures.updates and not math.isfinite(figures.grad_norm)
    after = [whole(w) for w in spread.policy.parameters()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    print("skipped together")


def computes_in_bfloat16(ranks: Ranks, commands: Iterator[Command] | None) -> None:
    """The passes are in bfloat16; weights, gradients and what the optimiser keeps are not. One rank
    takes the very step of a process without torchrun; two share out the trees, whose passes
    then round differently: they differ less from it than it does from float32."""
    for name in ("several passes", "trainer", "checkpointing", "trajectory"):
        options = {**CASES[name], "compute_dtype": "bfloat16"}
        exact, exact_slope = stepped(new_trainer(ALONE, CASES[name]), TREES, None)
        want, slope = stepped(new_trainer(ALONE, options), TREES, None)
        spread = new_trainer(ranks, options)
        seen: set[torch.dtype] = set()
        spread.policy.model.layers[0].mlp.register_forward_hook(
            lambda *a, seen=seen: seen.add(a[2].dtype)
        )
        figures, own_slope = stepped(spread, TREES, commands)
        assert seen == {torch.bfloat16} and want.loss != exact.loss
        weights = [whole(w) for w in spread.policy.parameters()]
        moments = [state["exp_avg"] for state in spread.optimizer.state.values()]
        assert {x.dtype for x in (*weights, *own_slope.values(), *moments)} == {torch.float32}
        if ranks.size == 1:
            assert figures.means() == pytest.approx(want.means(), rel=1e-12, nan_ok=True), name
            assert torch.equal(flat(own_slope), flat(slope)), name
        assert figures.loss == pytest.approx(want.loss, rel=2e-3), name
        rounding = (flat(slope) - flat(exact_slope)).norm()
        assert (flat(own_slope) - flat(slope)).norm() <= rounding < 0.05 * flat(slope).norm(), name
    print("computed in bfloat16")


def gathers(ranks: Ranks, commands: Iterator[Command] | None) -> None:
    """Published weights are whole, on rank 0."""
    alone, spread = new_trainer(ALONE, {}), new_trainer(ranks, {})
    if commands is not None:
        assert next(commands).name == "weights"
    gathered, want = weights_of(spread.policy, ranks), weights_of(alone.policy, ALONE)
    assert gathered.keys() == (want.keys() if ranks.leads else set())
    assert all(torch.equal(gathered[name], want[name]) for name in gathered)
    print("gathered")


def call_shards(
    call: Callable[..., None], trainer: Trainer, ranks: Ranks, commands: Iterator[Command] | None
) -> None:
    """Writes or reads the checkpoint in the folder that the command line names."""
    folder = Path(sys.argv[1]) if commands is None else Path(next(commands).facts["folder"])
    call(folder, trainer.policy, trainer.optimizer, ranks)


def restores(ranks: Ranks, commands: Iterator[Command] | None) -> None:
    """A checkpoint brings back each rank's part and generator. One that a single rank can not write
    fails on all of them, and they go on together."""
    torch.manual_seed(ranks.rank)
    spread, fresh = new_trainer(ranks, {}), new_trainer(ranks, {})
    stepped(spread, TREES, commands)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft if ranks.leads else 1000, hard))
    with pytest.raises(OSError, match="File too large"):
        call_shards(write_shards, spread, ranks, commands)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    call_shards(write_shards, spread, ranks, commands)
    drawn = torch.rand(3)
    call_shards(read_shards, fresh, ranks, commands)
    assert torch.equal(torch.rand(3), drawn)
    states = [list(trainer.optimizer.state.values()) for trainer in (spread, fresh)]
    for mine, theirs in zip(*states, strict=True):
        assert all(torch.equal(whole(mine[name]), whole(theirs[name])) for name in mine)
    for mine, theirs in zip(spread.policy.parameters(), fresh.policy.parameters(), strict=True):
        assert torch.equal(whole(mine), whole(theirs))
    print("restored")


def waits_quietly(ranks: Ranks, commands: Iterator[Command] | None) -> None:
    """Rank 0 may call later than the others' timeout."""
    if ranks.leads:
        threading.Event().wait(2 * TIMEOUT_S)
    gathers(ranks, commands)


def main() -> None:
    """Arguments: a folder for a checkpoint; or `quiet` or `bfloat16` for that check alone."""
    quiet = sys.argv[1] == "quiet"
    options = config(device="cpu", rank_timeout_s=TIMEOUT_S if quiet else LONG_S)
    checks = {"quiet": (waits_quietly,), "bfloat16": (computes_in_bfloat16,)}
    every = (compare, skips_together, computes_in_bfloat16, gathers, restores)
    with joined(options) as ranks:
        commands = None if ranks.leads else ranks.commands()
        for check in checks.get(sys.argv[1], every):
            check(ranks, commands)
        assert commands is None or next(commands, None) is None


if __name__ == "__main__":
    main()
