"""Which rule cuts one tree's rollouts into steps.

The rule `text` is known from the start. Under `auto` the unit is chosen once, when all of the first
round's rollouts are there, so that siblings are cut alike; those that come early wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ibtree.tree import Tree, TreeOptions
from server_ext.trees.cuts import Segmenter, choose_unit
from server_ext.trees.strategies import strategy_named
from server_ext.trees.text import Tokenizer

_LONG_TOKENS = 1024
"""Rollouts from here on are cut beside the event loop."""


class StepCutter:
    """For one tree. Raises FieldError for separators that the tokenizer cannot make."""

    def __init__(self, tokenizer: Tokenizer, options: TreeOptions) -> None:
        self._units: dict[str, Segmenter] = {}
        self._segmenter: Segmenter | None = None
        if options.step_rule == "auto":
            self._units = tokenizer.unit_segmenters(options.max_step_tokens)
        else:
            self._segmenter = tokenizer.segmenter(options.separators, options.max_step_tokens)
        first = strategy_named(options.strategy).first(options)
        self._expected = min(first, options.trajectories)
        self._first: list[Sequence[int]] = []
        self._chosen = asyncio.Event()

    async def lengths(self, tree: Tree, number: int, token_ids: Sequence[int]) -> list[int]:
        """Length of each step of rollout `number` [tokens]. The tree learns the unit."""
        if self._segmenter is None:
            if number < self._expected:
                self._first.append(token_ids)
            if len(self._first) < self._expected:
                await self._chosen.wait()
        segmenter = self._segmenter_of(tree)
        self._chosen.set()
        if len(token_ids) < _LONG_TOKENS:
            return segmenter.lengths(token_ids)
        return await asyncio.to_thread(segmenter.lengths, token_ids)

    def wait_no_longer(self) -> None:
        """Rollouts of the first round will not come any more: what is there decides."""
        self._chosen.set()

    def _segmenter_of(self, tree: Tree) -> Segmenter:
        if self._segmenter is None:
            tree.step_unit = choose_unit(self._units, self._first)
            self._segmenter = self._units[tree.step_unit]
        tree.step_unit = tree.step_unit or "text"
        return self._segmenter
