"""Checks the radix cache against computing afresh, on prefixes of the trees that grow now."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ibtree.messages import CacheAudit
from server_ext.cache.client import TreeCache
from server_ext.errors import EngineError, NoReplyError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """The log-probability of one token after a prefix [nats], how many tokens of the prefix came
    from the cache, and the weight version that scored."""

    logprob: float
    cached_tokens: int
    version: int


class Scorer(Protocol):
    """What an audit needs of an engine."""

    trees: TreeCache

    async def score(
        self, prefix: Sequence[int], token: int, *, tree: str = "", cold: bool = False
    ) -> Score: ...


@dataclass(frozen=True)
class OpenPrefix:
    """A prefix of a growing tree, and a token that followed it."""

    tree: str
    token_ids: tuple[int, ...]
    next_token: int


class Auditor:
    """Audits a few prefixes at a time, so that rollouts hardly notice."""

    def __init__(
        self,
        engine: Scorer,
        open_prefixes: Callable[[int], list[OpenPrefix]],
        report: Callable[[CacheAudit], None] = lambda _: None,
    ) -> None:
        """`open_prefixes`: gives those of the trees that grow now; `report` is told of every audit,
        whoever asked for it."""
        self._engine, self._open_prefixes, self._report = engine, open_prefixes, report

    async def audit(self, samples: int) -> CacheAudit:
        """Audits up to `samples` prefixes. Raises EngineError or NoReplyError."""
        total = CacheAudit()
        try:
            for prefix in self._open_prefixes(samples):
                if comparison := await self._compare(prefix):
                    total = _sum(total, comparison)
        finally:
            self._report(total)  # also of what was compared before it failed
        return total

    async def run(self, every_s: float) -> None:
        """Audits one prefix every `every_s` seconds, for ever."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.audit(1)
            except (EngineError, NoReplyError) as error:
                _log.warning("cache audit failed: %s", error)

    async def _compare(self, prefix: OpenPrefix) -> CacheAudit | None:
        """Scores the prefix's next token from the cache and afresh. None if the weights changed in
        between: then the two scores say nothing about the cache."""
        [probe] = await self._engine.trees.probe([prefix.token_ids])
        warm = await self._engine.score(prefix.token_ids, prefix.next_token, tree=prefix.tree)
        cold = await self._engine.score(
            prefix.token_ids, prefix.next_token, tree=prefix.tree, cold=True
        )
        if warm.version != cold.version:
            return None
        difference = abs(warm.logprob - cold.logprob)
        return CacheAudit(
            samples=1,
            prefix_tokens=len(prefix.token_ids),
            cached_tokens=warm.cached_tokens,
            stale_tokens=probe.stale_tokens,
            # not a number is no agreement, and would get lost in a maximum
            max_difference=difference if math.isfinite(difference) else math.inf,
        )


def _sum(a: CacheAudit, b: CacheAudit) -> CacheAudit:
    return CacheAudit(
        samples=a.samples + b.samples,
        prefix_tokens=a.prefix_tokens + b.prefix_tokens,
        cached_tokens=a.cached_tokens + b.cached_tokens,
        stale_tokens=a.stale_tokens + b.stale_tokens,
        max_difference=max(a.max_difference, b.max_difference),
    )
