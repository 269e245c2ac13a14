"""The CPU's sampler against SGLang's own, which sorts the vocabulary."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.server_ext.cache import scheduler  # noqa: F401  prepares sglang for the CPU

from sglang.srt.layers import sampler as stock  # isort: skip
from sglang.srt.sampling.sampling_params import TOP_K_ALL  # isort: skip

from server_ext.engine import sampler_cpu  # isort: skip
from server_ext.engine.sampler_cpu import (  # isort: skip
    CpuSampler,
    Rules,
    allowed,
    sample,
)

REAL = 151_936
CASES = [
    (20, 0.95, 0.0),  # the paper's
    (TOP_K_ALL, 0.95, 0.0),
    (TOP_K_ALL, 0.999, 0.0),
    (TOP_K_ALL, 1.0, 0.05),
    (1, 1.0, 0.0),
    (64, 1.0, 0.0),
    (65, 1.0, 0.0),
    (5_000, 0.7, 0.01),
    (TOP_K_ALL, 1e-6, 0.0),
]


def logprobs_of(rows: int, vocabulary: int, spread: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(spread * torch.randn(rows, vocabulary, generator=generator), -1)


def sorted_weights(logprobs: torch.Tensor, rules: Rules) -> torch.Tensor:
    """The weight of every token after SGLang's filters, in the vocabulary's order."""
    probs = logprobs.exp()
    _, weights, ids, _ = stock.top_k_top_p_min_p_sampling_from_probs_torch(
        probs,
        rules.top_k,
        rules.top_p,
        rules.min_p,
        bool((rules.min_p > 0).any()),
        None,
        torch.zeros(len(probs)),
        return_filtered_probs=True,
    )
    return torch.zeros_like(probs).scatter(1, ids.long(), weights)


def drawn_from(
    monkeypatch: pytest.MonkeyPatch, logprobs: torch.Tensor, rules: Rules
) -> torch.Tensor:
    """The weight of every token among which `sample` draws, in the vocabulary's order."""
    out = torch.zeros_like(logprobs)
    ids_of: list[torch.Tensor] = []
    topk = torch.Tensor.topk

    def spy_topk(self, *args, **kwargs):
        result = topk(self, *args, **kwargs)
        ids_of.append(result.indices)
        return result

    rows = torch.arange(len(logprobs))
    left = rows

    def spy_allowed(values, some):
        nonlocal left
        weights, complete = allowed(values, some)
        whole = complete | (values.shape[1] >= logprobs.shape[1])
        out[left[whole]] = out[left[whole]].scatter(1, ids_of[-1][whole], weights[whole])
        left = left[~whole]
        return weights, complete

    monkeypatch.setattr(torch.Tensor, "topk", spy_topk)
    monkeypatch.setattr(sampler_cpu, "allowed", spy_allowed)
    tokens = sample(logprobs, torch.zeros(len(logprobs), 1), rules)
    monkeypatch.undo()
    assert (out.gather(1, tokens.long().view(-1, 1)) > 0).all()
    return out


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), CASES)
def test_draws_from_what_a_full_sort_leaves(monkeypatch, top_k, top_p, min_p, spread):
    rows = 3
    logprobs = logprobs_of(rows, REAL, spread)
    rules = Rules(
        torch.full((rows,), top_k, dtype=torch.int32),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
    )
    expected = sorted_weights(logprobs, rules)
    found = drawn_from(monkeypatch, logprobs, rules)
    # ties at the edge may be resolved either way, and a running sum may round either way
    assert ((expected > 0).sum(-1) - (found > 0).sum(-1)).abs().max() <= (
        REAL * 1e-3 if spread == 0.0 or top_p == 0.999 else 1
    )
    if spread:
        both = (expected > 0) & (found > 0)
        torch.testing.assert_close(found[both], expected[both])
        assert both.sum(-1).min() >= (expected > 0).sum(-1).min() * 0.99


def test_each_row_has_rules_of_its_own(monkeypatch):
    logprobs = logprobs_of(len(CASES), 2_000, 2.0)
    columns = list(zip(*CASES, strict=True))
    rules = Rules(
        torch.tensor(columns[0], dtype=torch.int32),
        torch.tensor(columns[1]),
        torch.tensor(columns[2]),
    )
    expected = sorted_weights(logprobs, rules)
    found = drawn_from(monkeypatch, logprobs, rules)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rule", [(TOP_K_ALL, 1.0, 0.0), (4, 0.9, 0.0)])
def test_draws_are_distributed_as_the_weights(rule):
    torch.manual_seed(1)
    draws, vocabulary = 40_000, 1_200  # three blocks, the last one not full
    logprobs = logprobs_of(1, vocabulary, 2.0)
    top_k, top_p, min_p = rule
    rules = Rules(
        torch.full((draws,), top_k, dtype=torch.int32),
        torch.full((draws,), top_p),
        torch.full((draws,), min_p),
    )
    tokens = sample(logprobs.expand(draws, -1), torch.zeros(draws, 1), rules)
    weights = sorted_weights(logprobs, rules.rows(torch.tensor([0])))[0]
    expected = draws * weights / weights.sum()
    counts = torch.bincount(tokens.long(), minlength=vocabulary).float()
    assert counts[expected == 0].sum() == 0
    often = expected >= 5
    chi_square = float(((counts - expected)[often] ** 2 / expected[often]).sum())
    freedom = max(int(often.sum()) - 1, 1)
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def info(rows: int, **changes: object) -> SimpleNamespace:
    settings = {
        "is_all_greedy": False,
        "sampling_seed": None,
        "sampling_mask_batch_indices": None,
        "has_custom_logit_processor": False,
        "grammars": None,
        "temperatures": torch.full((rows, 1), 0.7),
        "top_ks": torch.full((rows,), 20, dtype=torch.int32),
        "top_ps": torch.full((rows,), 0.95),
        "min_ps": torch.zeros(rows),
    }
    return SimpleNamespace(**settings | changes)


def test_log_probabilities_are_the_whole_distribution_s_at_the_temperature():
    rows = 4
    sampler = object.__new__(CpuSampler)
    torch.nn.Module.__init__(sampler)
    sampler.rl_on_policy_target = None
    sampler.output_logprob_processor = stock.OutputLogprobProcessor()
    logits = 3 * torch.randn(rows, REAL)
    expected = torch.log_softmax(logits.double() / 0.7, -1)
    output = stock.LogitsProcessorOutput(next_token_logits=logits.clone())
    tokens = sampler.forward(output, info(rows), True, [0] * rows, [None] * rows, torch.zeros(rows))
    assert tokens.dtype == torch.int32
    found = torch.as_tensor(output.next_token_logprobs).double()
    torch.testing.assert_close(
        found, expected[torch.arange(rows), tokens.long()], atol=3e-6, rtol=0
    )
