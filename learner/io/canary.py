"""What the policy gives a few tokens, for the server to compare with what it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ibtree.tree import Tree
from ibtree.weights.manifest import Canary
from learner.train.precision import computing_in
from learner.tree.attention import SegmentAttention, hidden_states, installed

_SCORED = 8
"""Tokens; a wrong update hardly leaves all of them where they were."""


def canary_of(model: Any, tree: Tree, tolerance: float, dtype: torch.dtype) -> Canary:
    """The log-probabilities of the first tokens of the tree's first trajectory, at temperature 1,
    under the weights as they are published, in `dtype`: two steps at a rate of 1e-6, all of which
    bfloat16 rounds away, were seen to move one by 2 nats. `tolerance`: [nats]."""
    generated = tree.prefix(tree.end_nodes()[0])[:_SCORED]
    ids = (*tree.prompt, *generated)
    with computing_in(dtype, model):
        logits_MV = _logits(model, torch.tensor(ids, device=model.device))
    logits_TV = logits_MV[-len(generated) - 1 : -1]
    logp_TV = torch.log_softmax(logits_TV.float(), -1)
    logprobs = logp_TV.gather(1, torch.tensor(generated, device=logp_TV.device)[:, None])
    return Canary(ids, tuple(logprobs[:, 0].tolist()), tolerance)


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor
    if installed(model):
        position = torch.arange(len(ids))
        attention = SegmentAttention(position - 1, position)
        states = hidden_states(model, ids, position.to(ids.device), attention)
        logits = model.get_output_embeddings()(states)
    else:
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits
