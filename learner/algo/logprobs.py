"""Log-probabilities of chosen tokens without all tokens' logits in memory.

Shapes: T tokens, D features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def chunked_logprobs(
    head: Callable[[Tensor], Tensor],
    features_TD: Tensor,
    target_T: Tensor,
    *,
    temperature: float,
    chunk: int,
) -> Tensor:
    """ln softmax(head(features) / temperature) of each target, float32 (float64 stays), [T].

    `head` maps [t, D] to logits [t, V]. It sees `chunk` tokens at a time, again in the backward
    pass, so that at most chunk x V logits exist.
    """
    chunks = zip(torch.split(features_TD, chunk), torch.split(target_T, chunk), strict=True)
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    parts = [again(_logprobs, head, features, target, temperature) for features, target in chunks]
    return torch.cat(parts)


def _logprobs(
    head: Callable[[Tensor], Tensor], features_TD: Tensor, target_T: Tensor, temperature: float
) -> Tensor:
    logits = head(features_TD)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    chosen = logits.gather(-1, target_T[:, None]).squeeze(-1)
    return chosen - logits.logsumexp(-1)
