"""A tree as one JSON object."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from ibtree.tree import Tree
from ibtree.tree.score import confidences, ib_scores, values


def tree_object(tree: Tree) -> dict[str, Any]:
    """The whole tree; names and units as in protos/ibtree/v1/tree.proto (log-probabilities in
    nats). null: the root's parent, the score of a leaf, reward and finish where nothing ends."""
    return {
        "tree_id": tree.tree_id,
        "model_id": tree.model_id,
        "answer": tree.answer,
        "stop_cause": tree.stop_cause.name.lower(),
        "trajectories": tree.trajectories,
        "mean_reward": float(tree.rewards().mean()),
        "first_round_reward": tree.first_round_reward,
        "ledger": {"unique_tokens": tree.unique_tokens, **asdict(tree.ledger)},
        "options": asdict(tree.options),
        "prompt_token_ids": list(tree.prompt),
        "nodes": _nodes(tree),
    }


def _nodes(tree: Tree) -> list[dict[str, Any]]:
    value = values(tree, tree.options.value_estimator)
    confidence = confidences(tree, tree.options.confidence)
    score = ib_scores(tree)
    return [
        {
            "parent": tree.parents[n] if n else None,
            "text": tree.texts[n],
            "token_ids": list(step.token_ids),
            "logprobs": list(step.logprobs),
            "draws": tree.draws[n],
            "visits": tree.visits[n],
            "starts": tree.starts[n],
            "ends": tree.ends[n],
            "value": float(value[n]),
            "confidence": float(confidence[n]),
            "ib_score": _number(score[n]),
            "reward": _number(tree.reward(n)),
            "finish": tree.finishes[n].name.lower() if tree.ends[n] else None,
        }
        for n, step in enumerate(tree.steps)
    ]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
