"""Permits for the trees of SampleTree calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from server_ext.capacity.pace import Pace
from server_ext.errors import BusyError


class Calls:
    """Permits for interactive trees; a bounded number of calls waits for one."""

    def __init__(self, most_growing: int, most_waiting: int, pace: Pace) -> None:
        """`pace`: of such trees, for the hint when to come back."""
        self._permits = asyncio.Semaphore(most_growing)
        self._most_waiting, self._pace = most_waiting, pace
        self.growing = self.waiting = 0

    @asynccontextmanager
    async def permit(self) -> AsyncIterator[None]:
        """Waits for a permit; the call has it for the block. Raises BusyError if too many wait."""
        if self._permits.locked() and self.waiting >= self._most_waiting:
            retry_after_s = self._pace.expected_s(1)
            raise BusyError(f"{self.waiting} calls wait for a permit already", retry_after_s)
        self.waiting += 1
        try:
            await self._permits.acquire()
        finally:
            self.waiting -= 1
        self.growing += 1
        try:
            yield
        finally:
            self.growing -= 1
            self._permits.release()
