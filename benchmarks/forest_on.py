"""A forest on an engine of the benchmark's own, with nothing in the way of its trees."""

from __future__ import annotations

from typing import Any


def forest_on(
    engine: Any,
    tokenizer: Any,
    graders: Any,
    defaults: Any,
    grader: str,
    *,
    at_once: int = 256,
    max_rollouts: int = 100_000,
    cache_tokens: int | None = None,
) -> Any:
    """`at_once` trees grow at the same time for whoever holds the forest's `permits`."""
    from server_ext.trees.forest import Forest
    from server_ext.trees.limits import Limits

    return Forest(
        engine,
        tokenizer,
        graders,
        model_id="",
        defaults=defaults,
        default_grader=grader,
        limits=Limits(trajectories=64),
        max_open_trees=at_once,
        max_calls=at_once,
        max_waiting_calls=10_000,
        max_rollouts=max_rollouts,
        call_share=0.75,
        cache_tokens=cache_tokens,
    )
