"""A gate between rollouts and weight updates, so that no rollout spans two versions.

open ── update() ──▶ draining ── last rollout leaves ──▶ closed ── update ends ──▶ open
          rollouts arriving while it is draining or closed wait until it is open again
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """Many rollouts or one update."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._inside = 0
        self._updating = False

    @property
    def inside(self) -> int:
        """Rollouts inside now."""
        return self._inside

    @asynccontextmanager
    async def rollout(self) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._updating)
            self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1  # without the lock: leaving must not await when cancelled
            if self._inside == 0:
                asyncio.get_running_loop().create_task(self._notify())

    @asynccontextmanager
    async def update(self, drain_timeout_s: float) -> AsyncIterator[None]:
        """Raises TimeoutError, the gate open again, if rollouts do not leave in time."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._updating)
            self._updating = True
        try:
            async with asyncio.timeout(drain_timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._inside == 0)
            yield
        finally:
            self._updating = False
            await asyncio.shield(self._notify())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
