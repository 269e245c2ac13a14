"""How many trees may be open: as many as the radix cache can hold the prefixes of."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from server_ext.capacity.shares import Kind

_MEMORY = 0.9
"""Weight of what was known before, when one more tree has ended."""


@dataclass(eq=False)
class Reservation:
    """What an open tree needs: its prompt, and a part of the most it could generate [tokens]."""

    prompt_tokens: int
    most_tokens: int
    kind: Kind = Kind.QUEUED
    admitted: asyncio.Event = field(default_factory=asyncio.Event)


class Admission:
    """Trees of a kind wait in the order they came. One of each kind is always let in, however
    large.

    A tree is let in while those of its kind fit into the kind's share of the cache, whatever the
    other kind holds: the cache then keeps less of the oldest trees for a while, but no call waits
    for training trees to end, nor they for calls. Beyond its share a kind may have what is free.

    The fraction of the most that trees really use is learnt from those that end; until the first
    did, all of it is reserved.
    """

    def __init__(self, capacity_tokens: int | None, shares: Mapping[Kind, float]) -> None:
        """`capacity_tokens`: None is no limit."""
        self._capacity_tokens, self._shares = capacity_tokens, shares
        self._used_fraction: float | None = None
        self._open: dict[Kind, set[Reservation]] = {kind: set() for kind in Kind}
        self._lines: dict[Kind, deque[Reservation]] = {kind: deque() for kind in Kind}

    def waiting(self, kind: Kind) -> int:
        """Trees of the kind that wait for room."""
        return len(self._lines[kind])

    @asynccontextmanager
    async def reserve(
        self, prompt_tokens: int, most_tokens: int, kind: Kind = Kind.QUEUED
    ) -> AsyncIterator[Reservation]:
        """Waits until the tree fits; call `ended` inside with what it really used."""
        reservation = Reservation(prompt_tokens, most_tokens, kind)
        self._lines[kind].append(reservation)
        self._admit()
        try:
            await reservation.admitted.wait()
            yield reservation
        finally:
            if reservation in self._open[kind]:
                self._open[kind].remove(reservation)
            else:
                self._lines[kind].remove(reservation)
            self._admit()

    def ended(self, reservation: Reservation, unique_tokens: int) -> None:
        """The tree used this many tokens below its prompt, each counted once."""
        fraction = unique_tokens / reservation.most_tokens
        before = fraction if self._used_fraction is None else self._used_fraction
        self._used_fraction = _MEMORY * before + (1 - _MEMORY) * fraction
        self._admit()

    def _admit(self) -> None:
        """Nobody of a kind is overtaken for being large, or it might wait for ever."""
        for kind in Kind:
            line = self._lines[kind]
            while line and self._fits(line[0]):
                first = line.popleft()
                self._open[kind].add(first)
                first.admitted.set()

    def _fits(self, newcomer: Reservation) -> bool:
        kind, capacity = newcomer.kind, self._capacity_tokens
        if capacity is None or not self._open[kind]:
            return True
        held = {k: sum(map(self._tokens, trees)) for k, trees in self._open.items()}
        needed = self._tokens(newcomer)
        within_share = held[kind] + needed <= self._shares[kind] * capacity
        return within_share or sum(held.values()) + needed <= capacity

    def _tokens(self, reservation: Reservation) -> float:
        fraction = 1.0 if self._used_fraction is None else self._used_fraction
        return reservation.prompt_tokens + fraction * reservation.most_tokens
