"""Rollouts of one growing tree: joins engine, text and steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ibtree.tree import Finish, Step, Tree
from ibtree.tree.options import MAX_SEED
from server_ext.capacity.slots import Slots
from server_ext.engine.port import Completion, Engine
from server_ext.trees.cuts import stop_length
from server_ext.trees.cutter import StepCutter
from server_ext.trees.grower import Rollout
from server_ext.trees.job import Job
from server_ext.trees.off_loop import OffLoop
from server_ext.trees.strategies import strategy_named
from server_ext.trees.text import Tokenizer

_WARM_TOKENS = 64
_NOTHING = Completion((), (), (), Finish.NONE, 0, 0)


@dataclass(frozen=True)
class SamplerParts:
    """What every tree's sampler uses."""

    engine: Engine
    tokenizer: Tokenizer
    slots: Slots
    off_loop: OffLoop
    """Cuts and decodes what the rollouts of all trees generated."""


class TreeSampler:
    """The grower's sampler for one tree; request ids are `<name>/<rollout>`."""

    def __init__(
        self,
        parts: SamplerParts,
        job: Job,
        name: str,
        seed: int,
        began: Callable[[], None] = lambda: None,
    ) -> None:
        """`seed` of the tree; rollout number i has seed + i. `began` is told when the first rollout
        from the prompt claims its slot."""
        self._seed, self._began = seed, began
        self._engine, self._slots = parts.engine, parts.slots
        self._tokenizer, self._off_loop = parts.tokenizer, parts.off_loop
        self._cutter = StepCutter(parts.tokenizer, job.options, parts.off_loop)
        self._job, self._name = job, name
        first = strategy_named(job.options.strategy).first(job.options)
        self._shares_prompt = min(first, job.options.trajectories) > 1
        self._in_flight: set[str] = set()
        self._aborted = False
        self._warming: asyncio.Task[None] | None = None

    async def roll(self, tree: Tree, start: int, number: int) -> Rollout:
        if start == 0 and self._shares_prompt and len(tree.prompt) >= _WARM_TOKENS:
            await self._warmed(tree)
        # told one turn later: until then the others of the first round have claimed theirs too
        asyncio.get_running_loop().call_soon(self._began)
        prefix = tree.prefix(start)
        left = tree.options.sampling.max_new_tokens - len(prefix)
        completion = await self._generate(tree, str(number), prefix, left)
        finish, generated = completion.finish, len(completion.token_ids)
        if not generated:
            return Rollout([], finish, completion.prefix_tokens, completion.cached_tokens)
        stopped = await self._stop_length(tree, prefix, completion.token_ids)
        if stopped and finish is not Finish.NONE:
            finish, completion = Finish.STOP, completion.head(stopped)
        lengths = await self._cutter.lengths(tree, number, completion.token_ids)
        return Rollout(
            _steps(completion, lengths),
            finish,
            completion.prefix_tokens,
            completion.cached_tokens,
            generated - len(completion.token_ids),
        )

    async def _stop_length(
        self, tree: Tree, prefix: Sequence[int], token_ids: Sequence[int]
    ) -> int | None:
        if not (stops := tree.options.sampling.stop):
            return None
        decode = self._tokenizer.decode
        return await self._off_loop.of_tokens(
            len(token_ids), stop_length, decode, prefix, token_ids, stops
        )

    async def _warmed(self, tree: Tree) -> None:
        """Computes the prompt once: requests that start together would each compute it."""

        async def warm() -> None:
            completion = await self._generate(tree, "prompt", (), 1)
            tree.ledger.generated_tokens += len(completion.token_ids)
            tree.ledger.prefix_tokens += completion.prefix_tokens
            tree.ledger.cached_tokens += completion.cached_tokens

        if self._warming is None:
            self._warming = asyncio.create_task(warm())
        await asyncio.shield(self._warming)

    async def _generate(
        self, tree: Tree, number: str, prefix: tuple[int, ...], max_new_tokens: int
    ) -> Completion:
        rid = f"{self._name}/{number}"
        if self._aborted:
            return _NOTHING
        async with self._slots.slot(self._name, self._job.kind):
            if self._aborted:  # between the slot's being given and this turn
                return _NOTHING
            self._in_flight.add(rid)
            try:
                sampling, token_ids = tree.options.sampling, (*tree.prompt, *prefix)
                seed = (self._seed + int(number)) % (MAX_SEED + 1) if number.isdecimal() else 0
                return await self._engine.generate(rid, token_ids, sampling, max_new_tokens, seed)
            finally:
                self._in_flight.discard(rid)

    @property
    def in_flight(self) -> int:
        """Rollouts in the engine now."""
        return len(self._in_flight)

    def unfinished_tokens(self) -> int:
        """What they have generated so far [tokens]."""
        return sum(self._engine.generated_tokens(rid) for rid in self._in_flight)

    def abort(self, tree: Tree) -> None:
        self._aborted = True
        self._cutter.wait_no_longer()
        self._slots.give_up(self._name)
        for rid in list(self._in_flight):
            self._engine.abort(rid)

    def close(self) -> None:
        """Nobody rolls any more."""
        if self._warming:
            self._warming.cancel()


def _steps(completion: Completion, lengths: Sequence[int]) -> list[Step]:
    steps, at = [], 0
    for length in lengths:
        span = slice(at, at + length)
        token_ids, logprobs = completion.token_ids[span], completion.logprobs[span]
        steps.append(Step(token_ids, logprobs, completion.versions[span]))
        at += length
    return steps
