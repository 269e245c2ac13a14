"""Two kinds of trees, and how one thing that is taken in turns is shared between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from enum import Enum

_MEMORY = 0.9
"""Weight of the turns before, when one more has ended."""
_LEAST_S = 0.01
"""What a turn is charged at least, and before any has ended."""


class Kind(Enum):
    """Where a tree comes from."""

    CALL = "call"
    """A SampleTree call: somebody waits for it."""
    QUEUED = "queued"
    """A prompt of the queue."""


def shares_of(call_share: float) -> dict[Kind, float]:
    """Each kind's share, in (0, 1), if calls have this one."""
    return {Kind.CALL: call_share, Kind.QUEUED: 1.0 - call_share}


class Shares:
    """Whose turn is next, so that each kind which keeps on wanting turns has its share of the time
    that turns last (start-time fair queueing; P. Goyal, H. Vin, H. Cheng, SIGCOMM 1996).

    Each kind has a clock: the time it was given over its share. The kind whose clock is behind is
    next. A turn is charged when it begins, by how long turns of its kind lasted lately, and put
    right when it ends. A kind that wanted nothing for a while has no claim on that time: its clock
    is moved up to the other's.
    """

    def __init__(
        self, shares: dict[Kind, float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._shares, self._clock = shares, clock
        self._spent_s = dict.fromkeys(Kind, 0.0)
        """Turns that have ended."""
        self._typical_s = dict.fromkeys(Kind, _LEAST_S)
        self.running = dict.fromkeys(Kind, 0)
        """Turns that have begun and not ended."""

    def share(self, kind: Kind) -> float:
        """The kind's share, in (0, 1)."""
        return self._shares[kind]

    def wants(self, kind: Kind) -> None:
        """The kind wants turns; before, it wanted none."""
        past = {k: self._spent_s[k] / self._shares[k] for k in Kind}
        busy = [past[k] for k in Kind if k is not kind and self.running[k]]
        behind = (min(busy) if busy else max(past.values())) - self._at(kind)
        self._spent_s[kind] += max(behind, 0.0) * self._shares[kind]

    def next(self, among: Collection[Kind]) -> Kind:
        """The kind whose turn it is; a call's on a tie."""
        return min((kind for kind in Kind if kind in among), key=self._at)

    def begin(self, kind: Kind) -> float:
        """A turn of the kind begins. Returns what `end` wants to be told."""
        self.running[kind] += 1
        return self._clock()

    def end(self, kind: Kind, began: float) -> None:
        """A turn ends that began then."""
        lasted_s = max(self._clock() - began, _LEAST_S)
        self.running[kind] -= 1
        self._spent_s[kind] += lasted_s
        self._typical_s[kind] = _MEMORY * self._typical_s[kind] + (1 - _MEMORY) * lasted_s

    def _at(self, kind: Kind) -> float:
        """The kind's clock [s]."""
        charged = self.running[kind] * self._typical_s[kind]
        return (self._spent_s[kind] + charged) / self._shares[kind]
