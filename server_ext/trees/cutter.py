"""Which rule cuts one tree's rollouts into steps.

The rule `text` is known from the start. Under `auto` the unit is chosen once, when all of the first
round's rollouts are there, so that siblings are cut alike; those that come early wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ibtree.tree import Tree, TreeOptions
from server_ext.trees.cuts import Segmenter, choose_unit
from server_ext.trees.off_loop import OffLoop
from server_ext.trees.strategies import strategy_named
from server_ext.trees.text import Tokenizer


class StepCutter:
    """For one tree. Raises FieldError for separators that the tokenizer cannot make."""

    def __init__(self, tokenizer: Tokenizer, options: TreeOptions, off_loop: OffLoop) -> None:
        self._off_loop = off_loop
        self._units: dict[str, Segmenter] = {}
        self._segmenter: Segmenter | None = None
        if options.step_rule == "auto":
            self._units = tokenizer.unit_segmenters(options.max_step_tokens)
        else:
            self._segmenter = tokenizer.segmenter(options.separators, options.max_step_tokens)
        first = strategy_named(options.strategy).first(options)
        self._expected = min(first, options.trajectories)
        self._first: list[Sequence[int]] = []
        self._chosen, self._choosing = asyncio.Event(), asyncio.Lock()

    async def lengths(self, tree: Tree, number: int, token_ids: Sequence[int]) -> list[int]:
        """Length of each step of rollout `number` [tokens]. The tree learns the unit."""
        if self._segmenter is None:
            if number < self._expected:
                self._first.append(token_ids)
            if len(self._first) < self._expected:
                await self._chosen.wait()
        segmenter = await self._segmenter_of(tree)
        self._chosen.set()
        return await self._off_loop.of_tokens(len(token_ids), segmenter.lengths, token_ids)

    def wait_no_longer(self) -> None:
        """Rollouts of the first round will not come any more: what is there decides."""
        self._chosen.set()

    async def _segmenter_of(self, tree: Tree) -> Segmenter:
        async with self._choosing:
            if self._segmenter is None:
                first, tokens = [*self._first], sum(map(len, self._first))
                unit = await self._off_loop.of_tokens(tokens, choose_unit, self._units, first)
                tree.step_unit, self._segmenter = unit, self._units[unit]
        tree.step_unit = tree.step_unit or "text"
        return self._segmenter
