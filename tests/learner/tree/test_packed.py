"""Loss and gradient over packed trees against trajectory by trajectory, and against plain loops."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from ibtree.tree import Tree
from learner.train.forward import BUCKETS, PackedForward, bucket
from learner.train.trainer import StepFigures, Trainer
from learner.tree.attention import BLOCK, FlexTreeAttention, SegmentAttention
from learner.tree.pack import padded
from learner.tree.training import loss_weights_of, training_trees
from tests.learner.tiny import CPU, causal_lm, config, in_float64, mixed_batch, settings_of
from tests.learner.tree.test_layout import SHAPES, tree_of
from tests.reference import slow_loss
from tests.reference.slow_loss import Policy, Tokens

KINDS = ("Qwen2", "Qwen3", "Llama", "Mistral")
NORMS = ("trajectory", "token", "constant")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "draws": {"trajectory_weight": "draws", "value_estimator": "backup", "local_scale": "step"},
    "uniform kept": {"skip_uniform_trees": False, "local_weight": 1.0},
    "uniform counted": {"uniform_in_denominator": True, "clip_low": 0.1, "clip_high": 0.4},
    "trainer": {"old_logprobs": "trainer", "importance_cap": 1.3},
    "by the reference": {"local_reference": "reference", "local_weight": 1.0},
    "cut by the reference": {"local_reference": "reference", "micro_batch_tokens": 60},
    "cut": {"micro_batch_tokens": 60},
    "a trajectory a part": {"micro_batch_tokens": 1},
    "chunks": {"logits_chunk_tokens": 7},
    "checkpointing": {"activation_checkpointing": True, "micro_batch_tokens": 100},
}


def model_of(kind: str, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    window = {"sliding_window": None} if kind == "Mistral" else {}
    model = causal_lm(kind, seed=seed, tied=kind != "Llama", **window)
    return in_float64(model) if dtype == torch.float64 else model.to(dtype)


def all_shapes(seed: int = 0) -> list[Tree]:
    """Trees of every kind, two of them over prompts of their own."""
    trees = [tree_of(shape, seed) for shape in SHAPES]
    trees[1].prompt, trees[4].prompt = (3,), tuple(range(20))
    return trees


def stepped(
    kind: str, trees: list[Tree], dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[StepFigures, dict[str, Tensor]]:
    """Figures and gradients of one step; a reference model if there is a KL weight."""
    chosen = config(**{"grad_clip": 1e9, "temperature": 0.7, "max_new_tokens": 50, **options})
    policy = model_of(kind, 1, dtype)
    reference = model_of(kind, 2, dtype) if chosen.kl_weight else None
    figures = Trainer(policy, reference, chosen, CPU).step(trees, version=1)
    return figures, {name: w.grad for name, w in policy.named_parameters()}


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients.values()])


@pytest.mark.parametrize("kl_weight", [0.0, 0.04])
@pytest.mark.parametrize("length_norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameters_gradient_is_that_of_the_trajectories_in_float64(
    kind, length_norm, kl_weight
):
    options = {"kl_weight": kl_weight, "length_norm": length_norm}
    trees = all_shapes()
    want, slopes = stepped(kind, trees, torch.float64, forward="trajectory", **options)
    for limit in (16384, 90):
        figures, packed = stepped(kind, trees, torch.float64, micro_batch_tokens=limit, **options)
        assert figures.loss == pytest.approx(want.loss, rel=1e-9)
        assert figures.means() == pytest.approx(want.means(), rel=1e-9)
        assert packed.keys() == slopes.keys()
        for name, slope in slopes.items():
            assert (packed[name] - slope).norm() <= 1e-9 * slope.norm(), name
            assert slope.norm() > 1e-9 * want.grad_norm
    assert want.kl > 0 or not kl_weight


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_trajectories_in_float32(kind, options):
    trees = all_shapes(seed=1)
    want, slopes = stepped(kind, trees, forward="trajectory", **options)
    figures, packed = stepped(kind, trees, **options)
    assert figures.means() == pytest.approx(want.means(), rel=1e-4)
    assert want.gap_tokens < want.tokens and want.trained_trees < 7
    whole, other = flat(slopes), flat(packed)
    assert whole.norm() > 1e-3
    assert (other - whole).norm() <= 1e-5 * whole.norm()


def slow_policy(model: Any, temperature: float) -> Policy:
    """A forward pass over prompt and tokens for each token; remembered, loops ask again."""
    known: dict[Tokens, float] = {}

    def logp(prompt: Tokens, sofar: Tokens) -> float:
        whole = (*prompt, *sofar)
        if whole not in known:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([whole[:-1]]), use_cache=False).logits[0, -1]
            known[whole] = float(torch.log_softmax(logits / temperature, -1)[whole[-1]])
        return known[whole]

    return logp


@pytest.mark.parametrize("length_norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_plain_loops_over_trajectories(kind, length_norm):
    """The gradient along a random direction, from losses on both sides."""
    chosen = {"kl_weight": 0.04, "length_norm": length_norm, "max_new_tokens": 50}
    pairs = mixed_batch(random.Random(f"{kind}/{length_norm}"))
    figures, slopes = stepped(kind, [pair.fast for pair in pairs], torch.float64, **chosen)
    setting = settings_of(config(**chosen))
    policy, reference = model_of(kind, 1, torch.float64), model_of(kind, 2, torch.float64)
    frozen = slow_policy(reference, 0.7)

    def slow() -> float:
        trees = [pair.slow for pair in pairs]
        return slow_loss.loss(trees, (7, 8), setting, slow_policy(policy, 0.7), None, frozen)

    assert math.isclose(figures.loss, slow(), rel_tol=1e-9)
    generator, step, ends = torch.Generator().manual_seed(0), 1e-6, []
    weights = dict(policy.named_parameters())
    toward = {
        n: torch.randn(w.shape, generator=generator, dtype=w.dtype) for n, w in weights.items()
    }
    with torch.no_grad():
        for shift in (step, -2 * step):
            for name, weight in weights.items():
                weight += shift * toward[name]
            ends.append(slow())
    want = (ends[0] - ends[1]) / (2 * step)
    slope = sum(float((slopes[name] * toward[name]).sum()) for name in weights)
    assert abs(want) > 1e-3
    assert math.isclose(slope, want, rel_tol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_weights_train(kind):
    trees = all_shapes()
    want, slopes = stepped(kind, trees, torch.bfloat16, forward="trajectory")
    figures, packed = stepped(kind, trees, torch.bfloat16)
    assert figures.loss == pytest.approx(want.loss, abs=0.05)
    assert all(g.dtype == torch.bfloat16 for g in packed.values())
    whole, other = flat(slopes).float(), flat(packed).float()
    assert float(torch.cosine_similarity(whole, other, dim=0)) > 0.99


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_in_the_model_gives_the_same_log_probabilities(kind):
    """The GPU's way, but forward only and not compiled: padded, block mask, grouped heads."""
    model = model_of(kind, 1)
    model.requires_grad_(False)
    forward = packed_forward(model, skip_uniform_trees=False)
    batch = next(iter(forward.batches(training_trees(all_shapes(), config()))))
    long = padded(batch, bucket(len(batch.ids), 4096))
    assert len(long.ids) % BLOCK == 0 and len(long.ids) > len(batch.ids)
    long = replace(long, attention=FlexTreeAttention(long.last, flex_attention))
    logp, padded_logp = forward.logprobs(model, batch), forward.logprobs(model, long)
    assert torch.allclose(padded_logp, logp, atol=1e-4)


def packed_forward(model: Any, **changes: Any) -> PackedForward:
    chosen = config(**changes)
    return PackedForward([model], chosen, CPU, partial(loss_weights_of, config=chosen))


def test_trees_prepared_ahead_give_the_same_packs_and_are_forgotten_with_the_trees():
    model = model_of("Qwen2", 1)
    forward = packed_forward(model, micro_batch_tokens=100)
    trees = all_shapes()
    want = list(forward.batches(training_trees(trees, config())))
    for tree in trees[::2]:
        forward.prepare(tree)
    for batch, fresh in zip(forward.batches(training_trees(trees, config())), want, strict=True):
        for name, column in vars(fresh).items():
            assert name == "attention" or torch.equal(getattr(batch, name), column)
    made = forward._drafts
    assert len(made) == len(trees[::2])
    del trees, tree
    assert not made


@pytest.mark.parametrize("limit", [100, 1024, 16384, 100_000])
def test_packs_have_few_lengths(limit):
    lengths = {bucket(tokens, limit) for tokens in range(1, limit + 1, 7)}
    assert len(lengths) <= BUCKETS and all(length % BLOCK == 0 for length in lengths)
    for tokens in (1, 127, 128, 129, limit, 3 * limit):
        waste = bucket(tokens, limit) - tokens
        assert 0 <= waste < limit / BUCKETS + BLOCK


@pytest.mark.parametrize("forward", ["packed", "trajectory"])
def test_logits_exist_for_a_chunk_of_tokens_at_a_time(forward, monkeypatch):
    largest = []

    def watched(logits: Tensor, *arguments: Any, **options: Any) -> Tensor:
        largest.append(logits.shape)
        return logsumexp(logits, *arguments, **options)

    logsumexp = Tensor.logsumexp
    monkeypatch.setattr(Tensor, "logsumexp", watched)
    figures, _ = stepped("Qwen2", all_shapes(), forward=forward, logits_chunk_tokens=16)
    assert len(largest) > figures.tokens / 16
    assert max(shape[0] for shape in largest) == 16


@pytest.mark.parametrize("on", [False, True])
def test_activation_checkpointing_computes_the_layers_again(on, monkeypatch):
    calls = []
    attend = SegmentAttention.attend
    monkeypatch.setattr(SegmentAttention, "attend", lambda *a: calls.append(1) or attend(*a))
    stepped("Qwen2", [tree_of(SHAPES[2])], kl_weight=0.0, activation_checkpointing=on)
    assert len(calls) == 2 * (1 + 1 + on)  # two layers: tried once, forward, again in backward
