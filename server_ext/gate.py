"""A gate between rollouts and weight updates, so that no rollout spans two versions.

open ── update() ──▶ draining ── last rollout leaves ──▶ closed ── update ends ──▶ open
          rollouts arriving while it is draining or closed wait until it is open again
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class StillBusy(TimeoutError):
    """Rollouts did not leave in time; the gate is open again."""


class Gate:
    """Many rollouts or one update. For one event loop."""

    def __init__(self) -> None:
        self._inside = 0
        self._open, self._empty = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._empty.set()
        self._one_update = asyncio.Lock()
        self._shut = False

    @property
    def inside(self) -> int:
        """Rollouts inside now."""
        return self._inside

    def shut(self) -> None:
        """Inside an update: the gate never opens again."""
        self._shut = True

    @asynccontextmanager
    async def rollout(self) -> AsyncIterator[None]:
        """Waits until the gate is open; the rollout is inside for the block."""
        while not self._open.is_set():  # another update may close it before this one wakes up
            await self._open.wait()
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    @asynccontextmanager
    async def update(self, drain_timeout_s: float) -> AsyncIterator[None]:
        """Raises StillBusy if rollouts do not leave in time."""
        async with self._one_update:
            self._open.clear()
            try:
                try:
                    await asyncio.wait_for(self._empty.wait(), drain_timeout_s)
                except TimeoutError as error:
                    raise StillBusy(f"rollouts did not end within {drain_timeout_s} s") from error
                yield
            finally:
                if not self._shut:
                    self._open.set()
