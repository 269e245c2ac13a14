"""The canary: what the learner computes with the new weights, the engine must compute too."""

from __future__ import annotations

import asyncio

from ibtree.errors import FieldError
from ibtree.weights.manifest import Canary
from server_ext.engine.port import Engine
from server_ext.errors import CanaryError, EngineError

_MOST_TOKENS = 32
_DEADLINE_S = 600.0
"""Interrupted rollouts, whose prefixes are computed again, come first; new ones wait meanwhile."""


def check_sizes(canary: Canary, context_tokens: int) -> None:
    """Raises FieldError unless there is something to score that fits the engine."""
    count = len(canary.logprobs)
    if not 1 <= count <= _MOST_TOKENS:
        raise FieldError("manifest.canary.logprobs", f"{count} tokens", f"1 to {_MOST_TOKENS}")
    length = len(canary.token_ids)
    if not count < length < context_tokens:
        allowed = f"more than are scored, fewer than {context_tokens}"
        raise FieldError("manifest.canary.token_ids", f"{length} tokens", allowed)
    if not 0 < canary.tolerance < float("inf"):
        raise FieldError("manifest.canary.tolerance", f"{canary.tolerance}", "above 0 [nats]")


async def check_canary(engine: Engine, canary: Canary, version: int) -> None:
    """Raises CanaryError unless the engine computes what the learner did, or EngineError; call it
    inside `engine.paused`, after the load."""
    first = len(canary.token_ids) - len(canary.logprobs)
    try:
        async with asyncio.timeout(_DEADLINE_S) as deadline:
            scored = await asyncio.gather(
                *(
                    engine.try_out(canary.token_ids[:at], canary.token_ids[at])
                    for at in range(first, len(canary.token_ids))
                )
            )
    except TimeoutError as error:
        if not deadline.expired():
            raise
        problem = f"canary: version {version} was not scored within {_DEADLINE_S:g} s"
        raise EngineError(problem) from error
    for at, (mine, theirs) in enumerate(zip(scored, canary.logprobs, strict=True), start=first):
        # not a number is no agreement
        if not abs(mine - theirs) <= canary.tolerance:
            raise CanaryError(
                f"canary: version {version} gives token {at} {mine:.4f} nats here, "
                f"{theirs:.4f} in the learner; tolerance {canary.tolerance:.4g}"
            )
