"""Permits for the trees of SampleTree calls, and hints when to come back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from server_ext.errors import BusyError

_MEMORY = 0.9
"""Weight of the intervals before, when one more tree has ended."""
_SHORTEST_S, _UNKNOWN_S, _LONGEST_S = 0.1, 1.0, 60.0


class Pace:
    """How fast trees end, for hints when to come back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: float | None = None
        self._interval_s: float | None = None

    def ended(self) -> None:
        """One more tree has ended."""
        now = self._clock()
        if self._last is not None:
            before = self._interval_s if self._interval_s is not None else now - self._last
            self._interval_s = _MEMORY * before + (1 - _MEMORY) * (now - self._last)
        self._last = now

    def expected_s(self, trees: int) -> float:
        """Seconds until so many trees will have ended, in [0.1, 60]."""
        expected_s = _UNKNOWN_S if self._interval_s is None else self._interval_s * trees
        return min(max(expected_s, _SHORTEST_S), _LONGEST_S)


class Calls:
    """Permits for interactive trees; a bounded number of calls waits for one."""

    def __init__(self, most_growing: int, most_waiting: int, pace: Pace) -> None:
        self._permits = asyncio.Semaphore(most_growing)
        self._most_waiting, self._pace = most_waiting, pace
        self.growing = self.waiting = 0

    @asynccontextmanager
    async def permit(self) -> AsyncIterator[None]:
        """Waits for a permit; the call has it for the block. Raises BusyError if too many wait."""
        if self._permits.locked() and self.waiting >= self._most_waiting:
            retry_after_s = self._pace.expected_s(1)
            raise BusyError(f"{self.waiting} calls wait for a place already", retry_after_s)
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
