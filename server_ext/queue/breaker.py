"""Whether what trees need is there: a breaker that keeps an outage from burning the queue.

closed ── several errors in a row ──▶ open ── its pause is over, a prompt was taken ──▶ probing
   ▲                                   ▲ ▲                                                 │
   │                                   │ └── error: a longer pause ────────────────────────┤
   │                                   └──── that tree says nothing: the next one ─────────┤
   └───── a tree was graded that needed what was away ─────────────────────────────────────┘
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from enum import Enum

_log = logging.getLogger(__name__)
_ERRORS = 3
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
ENGINE = "the engine"


class Circuit(Enum):
    """States of the breaker; drawn in the module's docstring."""

    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"


class Breaker:
    """Told how trees ended; open while something they need is away. For one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.state = Circuit.CLOSED
        self._errors: Counter[str] = Counter()
        """Errors since the last tree that needed it was graded, by what was away."""
        self._pause_s = _FIRST_PAUSE_S
        self._until = self._since = 0.0

    @property
    def away(self) -> list[str]:
        """What is away, as far as is known."""
        return sorted(name for name, errors in self._errors.items() if errors >= _ERRORS)

    def wait_s(self) -> float | None:
        """Seconds until a prompt may be taken; None: not before a growing tree has ended."""
        match self.state:
            case Circuit.CLOSED:
                return 0.0
            case Circuit.OPEN:
                return max(self._until - self._clock(), 0.0)
            case Circuit.PROBING:
                return None

    def taken(self) -> None:
        """A prompt was taken: while the breaker is open, it is the one that tries."""
        if self.state is Circuit.OPEN:
            self._enter(Circuit.PROBING)

    def failed(self, what: str, problem: str) -> None:
        """A tree was interrupted because `what` was away."""
        self._errors[what] += 1
        if self.state is Circuit.CLOSED and self._errors[what] >= _ERRORS:
            self._since = self._clock()
            self._pause_s = _FIRST_PAUSE_S
            self._open(problem)
        elif self.state is Circuit.PROBING:
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            self._open(problem)

    def graded(self, grader: str) -> None:
        """A tree came to its end: the engine and its grader are there."""
        for name in (ENGINE, grader_name(grader)):
            self._errors.pop(name, None)
        if self.state is Circuit.CLOSED:
            return
        if not self.away:
            away_s = self._clock() - self._since
            _log.warning("prompts are taken again, after %.0f s", away_s)
            self._errors.clear()
            self._enter(Circuit.CLOSED)
        else:
            self.told_nothing()

    def told_nothing(self) -> None:
        """A tree ended, and nothing follows from it: another one may try."""
        if self.state is Circuit.PROBING:
            self._until = self._clock()
            self._enter(Circuit.OPEN)

    def _open(self, problem: str) -> None:
        self._until = self._clock() + self._pause_s
        _log.warning(
            "%s away: no prompts are taken for %.0f s, then one (%s)",
            " and ".join(self.away) + (" are" if len(self.away) > 1 else " is"),
            self._pause_s,
            problem,
        )
        self._enter(Circuit.OPEN)

    def _enter(self, state: Circuit) -> None:
        """The one place where the state changes."""
        self.state = state


def grader_name(grader: str) -> str:
    """What a grader is called when it is away."""
    return f"the grader {grader!r}"
