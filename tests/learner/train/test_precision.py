"""Passes in bfloat16 with weights, gradients and optimiser in float32: small steps move weights."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.config import LearnerConfig
from learner.dist.process_group import ALONE
from learner.dist.state import weights_of
from learner.run import new_trainer
from learner.train.model import compute_dtype_of
from learner.train.precision import computing_in
from learner.train.trainer import Trainer
from tests.learner.tiny import CPU, causal_lm, config, mixed_batch

TREES = [pair.fast for seed in range(3) for pair in mixed_batch(random.Random(seed))]
BFLOAT16 = {"compute_dtype": "bfloat16", "grad_clip": 1e9, "kl_weight": 0.0}


def model_folder(folder: Path, dtype: torch.dtype, scale: float = 1.0) -> Path:
    """Of a model whose weights are so many times the usual ones of these tests."""
    model = causal_lm()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(scale)
    model.to(dtype).save_pretrained(folder)
    return folder


def trainer_of(folder: Path, **options: Any) -> Trainer:
    chosen = LearnerConfig(model=folder, prompts="p", device="cpu", **options)
    return new_trainer(chosen, ALONE)


def flat(tensors: Any) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def test_small_steps_move_weights_and_what_is_published(tmp_path):
    """At the learning rate of RL, from a bfloat16 folder, with weights of the size that they have
    in real models: bfloat16 weights stood still in 98 of 100 places."""
    folder = model_folder(tmp_path, torch.bfloat16, scale=1 / 8)
    trainer = trainer_of(folder, lr=1e-6, kl_weight=0.0)
    start = flat(trainer.policy.parameters()).clone()
    published = [flat(weights_of(trainer.policy, ALONE, torch.bfloat16).values())]
    for step in range(200):
        assert trainer.step(TREES, version=1, updates=step).updates == 1
        if step % 100 == 99:
            published.append(flat(weights_of(trainer.policy, ALONE, torch.bfloat16).values()))
    after = flat(trainer.policy.parameters())
    assert after.dtype == torch.float32
    used = flat([weight.grad for weight in trainer.policy.parameters()]) != 0
    assert (after != start)[used].float().mean() > 0.99
    assert published[0].dtype == torch.bfloat16
    for before, now in pairwise(published):
        assert (now != before).float().mean() > 0.5


def test_passes_compute_in_bfloat16_and_the_rest_is_float32():
    policy = causal_lm()
    seen: set[torch.dtype] = set()
    norm = policy.model.norm
    norm.register_forward_hook(lambda _, ins, out: seen.update((ins[0].dtype, out.dtype)))
    chosen = config(**BFLOAT16)
    trainer = Trainer(policy, None, chosen, CPU)
    seen.clear()  # the trial of packed trees is in float32
    figures = trainer.step(TREES, version=1)
    assert seen == {torch.bfloat16} and figures.updates == 1
    moments = [state["exp_avg"] for state in trainer.optimizer.state.values()]
    kept = [*policy.parameters(), *(weight.grad for weight in policy.parameters()), *moments]
    assert {tensor.dtype for tensor in kept} == {torch.float32}


@pytest.mark.parametrize("forward", ["packed", "trajectory"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
def test_a_step_is_that_of_a_bfloat16_model(forward, again):
    """Loss and gradient to the bit, where there is one pass."""
    options = {**BFLOAT16, "forward": forward, "activation_checkpointing": again}
    policy, rounded = causal_lm(), causal_lm()
    for module in rounded.modules():  # the weights alone: rotary tables stay in float32
        for weight in module.parameters(recurse=False):
            weight.data = weight.data.to(torch.bfloat16)
    figures = Trainer(policy, None, config(**options), CPU).step(TREES, version=1)
    want = Trainer(rounded, None, config(**options), CPU).step(TREES, version=1)
    assert figures.loss == want.loss and figures.kl == want.kl
    slopes = [flat(w.grad.float() for w in model.parameters()) for model in (policy, rounded)]
    assert torch.equal(*slopes) and slopes[0].norm() > 1e-3


def test_gradients_of_many_passes_add_up_in_float32():
    """Each is 1/512 of the first: a bfloat16 sum would not notice them."""
    policy = causal_lm()
    weight = policy.model.norm.weight
    with computing_in(torch.bfloat16, policy):
        copy = policy.model.norm.weight
        assert copy is not weight and copy.dtype == torch.bfloat16
        for number in range(513):
            (copy.sum() * (1.0 if number == 0 else 1 / 512)).backward()
        assert copy.grad is None
    assert policy.model.norm.weight is weight
    assert weight.grad.tolist() == [2.0] * len(weight)
    total = torch.tensor(1.0, dtype=torch.bfloat16)
    for _ in range(512):
        total += torch.tensor(1 / 512, dtype=torch.bfloat16)
    assert total == 1.0


def test_tied_weights_have_one_copy_and_the_copies_end_with_the_passes():
    policy = causal_lm(tied=True)
    before = dict(policy.named_parameters())
    with pytest.raises(RuntimeError, match="in the middle"), computing_in(torch.bfloat16, policy):
        assert policy.lm_head.weight is policy.model.embed_tokens.weight
        assert {weight.dtype for weight in policy.parameters()} == {torch.bfloat16}
        raise RuntimeError("in the middle")
    after = dict(policy.named_parameters())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert policy.lm_head.weight is policy.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("stored", "computed"),
    [(torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.float16, "bfloat16")],
)
def test_a_folder_is_computed_in_what_it_holds(tmp_path, stored, computed):
    folder = model_folder(tmp_path, stored)
    assert compute_dtype_of(folder) == computed
    trainer = trainer_of(folder)
    assert {weight.dtype for weight in trainer.policy.parameters()} == {torch.float32}
    frozen = {weight.dtype for weight in trainer._reference.parameters()}
    assert frozen == {getattr(torch, computed)} and trainer._config.compute_dtype == computed
    assert trainer_of(folder, compute_dtype="float32")._config.compute_dtype == "float32"


@pytest.mark.parametrize("option", ["--dtype=bfloat16", "--dtype bfloat16"])
def test_bfloat16_weights_are_refused_with_the_remedy(option):
    with pytest.raises(SystemExit) as ended:
        LearnerConfig.load("ibtpo-learner", ["--model=m", "--prompts=p", *option.split()])
    said = str(ended.value)
    assert said.startswith("ibtpo-learner: --dtype: weights stay float32; --compute-dtype bfloat16")
    assert "\n" not in said
