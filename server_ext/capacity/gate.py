"""A gate between rollouts and weight updates.

open ── update() ──▶ draining ── last rollout leaves ──▶ closed ── update ends ──▶ open
          rollouts arriving while it is draining or closed wait until it is open again

An update that does not drain closes it at once, and those inside stay there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from server_ext.errors import StillBusy


class Gate:
    """Many rollouts, or one update beside those that came before it. For one event loop."""

    def __init__(self) -> None:
        self._inside = 0
        self._open, self._empty = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._empty.set()
        self._updating = asyncio.Lock()
        self._shut = False

    @property
    def is_open(self) -> bool:
        """Whether rollouts may go in now."""
        return self._open.is_set()

    @property
    def is_shut(self) -> bool:
        return self._shut

    def shut(self) -> None:
        """The gate never opens again; call it inside an update."""
        self._shut = True

    async def opened(self) -> None:
        """Returns when the gate is open."""
        while not self._open.is_set():  # another update may close it before this one wakes up
            await self._open.wait()

    @asynccontextmanager
    async def rollout(self) -> AsyncIterator[None]:
        """Waits until the gate is open; the rollout is inside for the block."""
        await self.opened()
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    @asynccontextmanager
    async def update(self, drain_timeout_s: float | None) -> AsyncIterator[None]:
        """The gate is closed for the block. `drain_timeout_s`: None does not wait for the rollouts
        inside. Raises StillBusy if they do not leave in time."""
        async with self._updating:
            self._open.clear()
            try:
                try:
                    if drain_timeout_s is not None:
                        await asyncio.wait_for(self._empty.wait(), drain_timeout_s)
                except TimeoutError as error:
                    raise StillBusy(f"rollouts did not end within {drain_timeout_s} s") from error
                yield
            finally:
                if not self._shut:
                    self._open.set()
