"""What only benchmarks need of an engine: SGLang's own radix cache, and an empty one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from ibtree.messages import CacheState
from server_ext.cache.client import Probe, TreeCache
from server_ext.cache.open_trees import TreeAccount
from server_ext.engine.sglang import SglangEngine
from server_ext.errors import EngineError


class DefaultCacheEngine(SglangEngine):
    """SGLang's own radix cache is used, which knows no trees and is emptied at every update."""

    backend = ""

    def _tree_cache(self, ranks: int) -> TreeCache:
        return NoTreeCache()

    async def load(self, tensors: Iterable[tuple[str, Any]], version: int) -> None:
        await super().load(tensors, version)
        await flush(self)  # KV of the old weights must never serve the new ones


class NoTreeCache(TreeCache):
    """The cache of an engine that knows no trees."""

    def __init__(self) -> None:
        super().__init__(lambda **_: None, ranks=1)

    async def close(self, name: str) -> TreeAccount:
        self.drop(name)
        return TreeAccount()

    async def probe(self, prefixes: Sequence[Sequence[int]]) -> list[Probe]:
        return [Probe(0, 0)] * len(prefixes)

    async def state(self) -> CacheState:
        return CacheState()


async def flush(engine: SglangEngine) -> None:
    """Empties the radix cache. Raises EngineError if requests go on running."""
    for _ in range(50):
        # The scheduler refuses while an aborted request's last step is still in flight.
        if (await engine._engine.tokenizer_manager.flush_cache()).success:
            return
        await asyncio.sleep(0.02)
    raise EngineError("the radix cache could not be flushed: requests are still running")
