"""Held-out accuracy through a server: independent rollouts, graded, with an interval."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ibtree.client import AsyncClient
from ibtree.messages import Prompt
from ibtree.tree.options import TreeOptions, changed


@dataclass(frozen=True)
class Accuracy:
    """Mean reward over problems, with its 95 % Wilson interval (for rewards of 0 and 1)."""

    mean: float
    low: float
    high: float
    problems: int


def wilson(mean: float, count: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927); (0, 1) without observations."""
    if not count:
        return 0.0, 1.0
    z = 1.959964
    centre = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


async def evaluate_async(
    target: str,
    prompts: Sequence[Prompt],
    options: TreeOptions,
    *,
    in_flight: int = 64,
    timeout_s: float = 600.0,
) -> Accuracy:
    """One independent rollout a prompt, sampled as `options` say (their shape is not used)."""
    single = changed(
        options,
        strategy="independent",
        init_rollouts=1,
        rounds=1,
        branch_nodes=1,
        branch_rollouts=1,
    )
    permits = asyncio.Semaphore(in_flight)

    async def evaluate_prompt(client: AsyncClient, prompt: Prompt) -> float:
        async with permits:
            asked = Prompt(prompt.content, "", prompt.answer, prompt.grader, single)
            tree = await client.sample_tree(asked, timeout_s=timeout_s)
            return float(tree.rewards()[0])

    async with AsyncClient(target) as client:
        rewards = await asyncio.gather(*(evaluate_prompt(client, prompt) for prompt in prompts))
    mean = sum(rewards) / max(len(rewards), 1)
    return Accuracy(mean, *wilson(mean, len(rewards)), len(rewards))


def evaluate(target: str, prompts: Sequence[Prompt], options: TreeOptions) -> Accuracy:
    """The accuracy as `evaluate_async` finds it, for a caller without an event loop."""
    return asyncio.run(evaluate_async(target, prompts, options))
