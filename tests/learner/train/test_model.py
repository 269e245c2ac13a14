"""token_logprobs against a row-by-row loop without padding; loading a policy."""

from __future__ import annotations

import math
import random

import pytest
import torch

from ibtree.errors import FieldError
from learner.dist.process_group import pick_device
from learner.train.model import load_policy, token_logprobs
from tests.learner.tiny import CPU, causal_lm

KINDS = ("Qwen2", "Llama")
Row = tuple[list[int], list[int]]


def rows(seed: int = 0) -> list[Row]:
    """Prompts and completions of many different lengths; id 0, the padding, occurs in both."""
    rng = random.Random(seed)
    lengths = [(1, 1), (1, 9), (7, 1), (3, 4), (12, 5), (2, 9)]
    return [
        ([rng.randrange(40) for _ in range(p)], [0, *[rng.randrange(40) for _ in range(n - 1)]])
        for p, n in lengths
    ]


def padded(batch: list[Row], filler: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = max(len(p) + len(c) for p, c in batch)
    ids = torch.full((len(batch), wide), filler)
    mask = torch.zeros(len(batch), wide, dtype=torch.long)
    for b, (prompt, completion) in enumerate(batch):
        whole = [*prompt, *completion]
        ids[b, : len(whole)] = torch.tensor(whole)
        mask[b, : len(whole)] = 1
    return ids, mask, torch.tensor([len(p) for p, _ in batch])


def slow_logprobs(model, prompt: list[int], completion: list[int], temperature: float):
    """A forward pass over the tokens before, for each token; log-softmax in plain floats."""
    logp = []
    for t, token in enumerate(completion):
        before = torch.tensor([[*prompt, *completion[:t]]])
        with torch.no_grad():
            logits = [x / temperature for x in model(input_ids=before).logits[0, -1].tolist()]
        top = max(logits)
        logp.append(logits[token] - top - math.log(math.fsum(math.exp(x - top) for x in logits)))
    return logp


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_those_of_each_row_alone(kind, temperature):
    model, batch = causal_lm(kind, seed=3), rows()
    with torch.no_grad():
        logp = token_logprobs(model, *padded(batch), 9, temperature=temperature)
    assert logp.dtype == torch.float32 and logp.shape == (len(batch), 9)
    for b, (prompt, completion) in enumerate(batch):
        want = slow_logprobs(model, prompt, completion, temperature)
        n = len(completion)
        assert logp[b, :n].tolist() == pytest.approx(want, abs=2e-5)
        assert min(want) < -1.0  # the model is far from flat, so that a shift by one would show
        assert not logp[b, n:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_see_the_padding_or_each_other(kind):
    model, batch = causal_lm(kind, seed=3), rows()
    ids, mask, prompt = padded(batch)
    with torch.no_grad():
        want = token_logprobs(model, ids, mask, prompt, 9, temperature=0.7)
        assert torch.equal(
            token_logprobs(model, *padded(batch, filler=17), 9, temperature=0.7), want
        )
        order = [3, 1, 5, 0, 2, 4]
        shuffled = token_logprobs(model, ids[order], mask[order], prompt[order], 9, temperature=0.7)
    assert torch.allclose(shuffled, want[order], atol=1e-5)


def test_gradient_is_that_of_each_row_alone():
    batch = rows(seed=1)
    together, alone = causal_lm(seed=3), causal_lm(seed=3)
    token_logprobs(together, *padded(batch), 9, temperature=0.7).sum().backward()
    for row in batch:
        token_logprobs(alone, *padded([row]), len(row[1]), temperature=0.7).sum().backward()
    for a, b in zip(together.parameters(), alone.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm() + 1e-6


def test_bfloat16_logits_are_normalised_in_float32():
    model = causal_lm(seed=3).to(torch.bfloat16)
    ids, mask, prompt = padded([([1, 2], [3])])
    with torch.no_grad():
        logp = token_logprobs(model, ids, mask, prompt, 1, temperature=1.0)
        logits = model(input_ids=ids).logits[0, 1].float()
    assert logp.dtype == torch.float32
    assert float(logp) == pytest.approx(float(torch.log_softmax(logits, -1)[3]), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_policy_loads(tmp_path, kind):
    saved = causal_lm(kind, seed=3, tied=kind == "Qwen2")
    saved.save_pretrained(tmp_path)
    loaded = load_policy(tmp_path, CPU, "float32")
    assert not loaded.training
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert load_policy(tmp_path, CPU, "bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_a_folder_without_a_model_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(FieldError, match="model") as caught:
        load_policy(tmp_path, CPU, "float32")
    assert str(tmp_path) in str(caught.value)


def test_devices():
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(FieldError, match="device"):
            pick_device("cuda")
