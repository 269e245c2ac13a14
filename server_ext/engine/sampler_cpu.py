"""SGLang's sampler for a CPU, without sorting the vocabulary.

SGLang 0.5.21 sorts every row of logits as soon as one request has a top-p, top-k or min-p
(`top_k_top_p_min_p_sampling_from_probs_torch` in layers/sampler.py): 0.4 s a step for 32 rows of
151,936 on one core. What can be sampled lies among the most likely few tokens, so those are
selected first, and the same rules are applied inside them. The distribution is the same one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sglang.srt.layers import sampler as stock

_FIRST_WIDTH, _WIDER = 64, 16
_BLOCK = 512


class Rules(NamedTuple):
    """What each row allows: the `top_k` most likely tokens [rows], of which those whose more
    likely ones have at most `top_p` of the whole mass [rows], of which those at least `min_p` times
    as likely as the likeliest [rows]."""

    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor

    def rows(self, chosen: torch.Tensor) -> Rules:
        return Rules(self.top_k[chosen], self.top_p[chosen], self.min_p[chosen])


class CpuSampler(stock.Sampler):  # type: ignore[misc]
    """SGLang's sampler; what it need not sort for, it does not."""

    def forward(
        self,
        logits_output: Any,
        sampling_info: Any,
        return_logprob: bool,
        top_logprobs_nums: list[int],
        token_ids_logprobs: list[Any],
        positions: torch.Tensor,
    ) -> torch.Tensor:
        if (
            sampling_info.is_all_greedy
            or sampling_info.sampling_seed is not None
            or sampling_info.sampling_mask_batch_indices is not None
            or self.rl_on_policy_target is not None
            or stock.SGLANG_RETURN_ORIGINAL_LOGPROB
            or logits_output.next_token_logits.device.type != "cpu"
        ):
            return super().forward(  # type: ignore[no-any-return]
                logits_output,
                sampling_info,
                return_logprob,
                top_logprobs_nums,
                token_ids_logprobs,
                positions,
            )
        logits = self._preprocess_logits(logits_output.next_token_logits, sampling_info)
        logits = logits.float().div_(sampling_info.temperatures)
        normalizer = log_normalizer(logits)
        rules = Rules(sampling_info.top_ks, sampling_info.top_ps, sampling_info.min_ps)
        tokens = sample(logits, normalizer, rules)
        if return_logprob and (any(top_logprobs_nums) or any(token_ids_logprobs)):
            self.output_logprob_processor.compute_logprobs(
                logits - normalizer, top_logprobs_nums, token_ids_logprobs, tokens
            ).write_output_to(logits_output)
        elif return_logprob:
            drawn = logits.gather(1, tokens.long().view(-1, 1)) - normalizer
            logits_output.next_token_logprobs = drawn.flatten()
        self._sync_token_ids_across_tp(tokens, sampling_info)
        return tokens


def log_normalizer(logits: torch.Tensor) -> torch.Tensor:
    """log Σ exp over the vocabulary, float32 [rows, 1]. torch's own log_softmax adds 151,936 terms
    one after the other, and is off by 1e-5; its sums are pairwise."""
    largest = logits.amax(-1, keepdim=True)
    return (logits - largest).exp_().sum(-1, keepdim=True).log_().add_(largest)


def sample(logits: torch.Tensor, normalizer: torch.Tensor, rules: Rules) -> torch.Tensor:
    """One token a row, int32 [rows], from logits [rows, vocabulary] with their log_normalizer,
    under the rules."""
    vocabulary = logits.shape[1]
    tokens = torch.empty(len(logits), dtype=torch.int32)
    free = (rules.top_k >= vocabulary) & (rules.top_p >= 1.0) & (rules.min_p <= 0.0)
    if free.any():
        tokens[free] = _sample_any((logits[free] - normalizer[free]).exp_())
    rows, width = torch.nonzero(~free).flatten(), _FIRST_WIDTH
    while len(rows):
        some = logits if len(rows) == len(logits) else logits[rows]
        values, ids = some.topk(min(width, vocabulary), dim=-1)
        weights, complete = allowed((values - normalizer[rows]).exp_(), rules.rows(rows))
        complete |= width >= vocabulary
        drawn = torch.multinomial(weights[complete], 1)
        tokens[rows[complete]] = ids[complete].gather(1, drawn).flatten().to(torch.int32)
        rows, width = rows[~complete], width * _WIDER
    return tokens


def allowed(weights: torch.Tensor, rules: Rules) -> tuple[torch.Tensor, torch.Tensor]:
    """The probabilities of the likeliest tokens [rows, width], in order, with 0 where a rule
    excludes one, and whether all that a row allows is among them [rows]."""
    before = weights.cumsum(-1) - weights
    out = torch.arange(weights.shape[1]) >= rules.top_k.view(-1, 1)
    out |= before > rules.top_p.view(-1, 1)
    out |= weights < weights[:, :1] * rules.min_p.view(-1, 1)
    # nothing after an excluded token is allowed; a width of exactly top_k holds all, too
    complete = out[:, -1] | (rules.top_k <= weights.shape[1])
    return weights.masked_fill(out, 0.0), complete


def _sample_any(probs: torch.Tensor) -> torch.Tensor:
    """One token a row from the whole distribution: first a block of the vocabulary, then a token of
    it, as one running sum over the vocabulary would lose the last digits of float32."""
    rows, vocabulary = probs.shape
    blocks = torch.nn.functional.pad(probs, (0, -vocabulary % _BLOCK)).view(rows, -1, _BLOCK)
    block = torch.multinomial(blocks.sum(-1), 1)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, 1, _BLOCK)).squeeze(1)
    return (block * _BLOCK + torch.multinomial(inside, 1)).flatten().to(torch.int32)
