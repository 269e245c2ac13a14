"""How fast trees end, for hints when to come back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_MEMORY_S = 60.0
"""How long ago an end counts for 1/e of one now; only time in which trees grow passes."""
_SHORTEST_S, _UNKNOWN_S, _LONGEST_S = 0.1, 1.0, 30.0
"""The longest hint is below our clients' default time-out, so that they can follow it."""


class Pace:
    """Trees of one kind that end per second while any grows, over the last minute or so. Time in
    which none grows (a night without prompts) is not counted."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._growing = 0
        self._until = clock()
        """Up to when time was counted."""
        self._busy_s = self._ends = 0.0
        """Time in which trees grew, and their ends: both count less the longer they are ago."""

    @contextmanager
    def growing(self) -> Iterator[None]:
        """A tree grows, or waits for room, in the block."""
        self._count()
        self._growing += 1
        try:
            yield
        finally:
            self._count()
            self._growing -= 1

    def ended(self) -> None:
        """One more tree has ended well; call it inside `growing`."""
        self._count()
        self._ends += 1.0

    def expected_s(self, trees: int) -> float:
        """Seconds until so many trees will have ended, in [0.1, 30]."""
        self._count()
        rate = self._ends / self._busy_s if self._busy_s else 0.0  # [1/s]
        expected_s = trees / rate if rate else _UNKNOWN_S
        return min(max(expected_s, _SHORTEST_S), _LONGEST_S)

    def _count(self) -> None:
        now = self._clock()
        if self._growing:
            kept = math.exp((self._until - now) / _MEMORY_S)
            self._busy_s = self._busy_s * kept + _MEMORY_S * (1.0 - kept)
            self._ends *= kept
        self._until = now
