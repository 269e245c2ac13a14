"""How many trees may be open: as many as the radix cache can hold the prefixes of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

_MEMORY = 0.9
"""Weight of what was known before, when one more tree has ended."""


@dataclass(eq=False)
class Reservation:
    """What an open tree needs: its prompt, and a part of the most it could generate [tokens]."""

    prompt_tokens: int
    most_tokens: int
    urgent: bool = False
    admitted: asyncio.Event = field(default_factory=asyncio.Event)


class Admission:
    """Trees wait in the order they came, urgent ones first. One is always let in, however large.

    The fraction of the most that trees really use is learnt from those that end; until the first
    did, all of it is reserved.
    """

    def __init__(self, capacity_tokens: int | None) -> None:
        """None: no limit."""
        self._capacity_tokens = capacity_tokens
        self._used_fraction: float | None = None
        self._open: set[Reservation] = set()
        self._line: list[Reservation] = []

    @property
    def waiting(self) -> int:
        """Trees that wait for room."""
        return len(self._line)

    @asynccontextmanager
    async def reserve(
        self, prompt_tokens: int, most_tokens: int, *, urgent: bool = False
    ) -> AsyncIterator[Reservation]:
        """Waits until the tree fits; call `ended` inside with what it really used."""
        reservation = Reservation(prompt_tokens, most_tokens, urgent)
        self._line.append(reservation)
        self._admit()
        try:
            await reservation.admitted.wait()
            yield reservation
        finally:
            if reservation in self._open:
                self._open.remove(reservation)
            else:
                self._line.remove(reservation)
            self._admit()

    def ended(self, reservation: Reservation, unique_tokens: int) -> None:
        """The tree used this many tokens below its prompt, each counted once."""
        fraction = unique_tokens / reservation.most_tokens
        before = fraction if self._used_fraction is None else self._used_fraction
        self._used_fraction = _MEMORY * before + (1 - _MEMORY) * fraction
        self._admit()

    def _admit(self) -> None:
        """Nobody is overtaken for being large, or it might wait for ever."""
        while self._line:
            first = min(self._line, key=lambda reservation: not reservation.urgent)
            if not self._fits(first):
                return
            self._line.remove(first)
            self._open.add(first)
            first.admitted.set()

    def _fits(self, newcomer: Reservation) -> bool:
        if self._capacity_tokens is None or not self._open:
            return True
        needed = self._tokens(newcomer) + sum(map(self._tokens, self._open))
        return needed <= self._capacity_tokens

    def _tokens(self, reservation: Reservation) -> float:
        fraction = 1.0 if self._used_fraction is None else self._used_fraction
        return reservation.prompt_tokens + fraction * reservation.most_tokens
