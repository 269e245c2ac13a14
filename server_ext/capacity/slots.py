"""Slots for rollouts in the engine, divided between the growing trees."""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from server_ext.capacity.shares import Kind, Shares


@dataclass(eq=False)
class _Turn:
    """A rollout that waits for a slot, or has one."""

    tree: str
    kind: Kind
    granted: asyncio.Future[float]
    """When it got it, on the clock of the shares."""


class Slots:
    """A free slot goes to the kind of trees whose turn it is by its share; there to the tree with
    the fewest rollouts in flight, then to the one that has waited longest. For one event loop."""

    def __init__(self, count: int, shares: Shares) -> None:
        self._count = self._free = count
        self._shares = shares
        self._in_flight: Counter[str] = Counter()
        self._waiting: dict[Kind, dict[str, deque[_Turn]]] = {kind: {} for kind in Kind}
        self._changes: list[asyncio.Future[None]] = []
        """Those who wait for a change."""

    def unclaimed(self, kind: Kind) -> int:
        """Slots that more trees of the kind could use: none while its rollouts wait; else those
        that are free or, if the other kind has all, those that its share still gives it."""
        if self._waiting[kind]:
            return 0
        if not any(self._waiting.values()):
            return self._free
        return max(math.ceil(self._count * self._shares.share(kind)) - self._held(kind), 0)

    async def changed(self) -> None:
        """Returns when a slot was given, left, or claimed."""
        change: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changes.append(change)
        await change

    def tell(self) -> None:
        """Wakes those who wait for a change."""
        changes, self._changes = self._changes, []
        for change in changes:
            if not change.done():
                change.set_result(None)

    @property
    def in_flight(self) -> int:
        """Rollouts that have a slot now."""
        return self._in_flight.total()

    @asynccontextmanager
    async def slot(self, tree: str, kind: Kind = Kind.QUEUED) -> AsyncIterator[None]:
        """Waits until a rollout of the tree has its turn; it has the slot for the block."""
        turn = _Turn(tree, kind, asyncio.get_running_loop().create_future())
        if not self._waiting[kind]:
            self._shares.wants(kind)
        self._waiting[kind].setdefault(tree, deque()).append(turn)
        self._grant()
        self.tell()
        try:
            await turn.granted
            yield
        finally:
            if turn.granted.done() and not turn.granted.cancelled():
                self._release(turn)
            else:
                self._forget(turn)
                self.tell()

    def give_up(self, tree: str) -> None:
        """Cancels the tree's rollouts that still wait."""
        for waiting in self._waiting.values():
            for turn in waiting.pop(tree, ()):
                turn.granted.cancel()

    def _held(self, kind: Kind) -> int:
        return self._shares.running[kind]

    def _grant(self) -> None:
        while self._free and (kinds := [kind for kind in Kind if self._waiting[kind]]):
            kind = self._shares.next(kinds)
            waiting = self._waiting[kind]
            turn = waiting[min(waiting, key=self._in_flight.__getitem__)][0]
            self._forget(turn)
            if not turn.granted.cancelled():  # its task was cancelled, and has not run since
                self._free -= 1
                self._in_flight[turn.tree] += 1
                turn.granted.set_result(self._shares.begin(kind))

    def _forget(self, turn: _Turn) -> None:
        """The turn is no longer waited for."""
        waiting = self._waiting[turn.kind]
        line = waiting.get(turn.tree, deque())
        if turn in line:
            line.remove(turn)
            # a tree that goes on waiting stands behind those that wait already
            del waiting[turn.tree]
            if line:
                waiting[turn.tree] = line

    def _release(self, turn: _Turn) -> None:
        self._free += 1
        self._shares.end(turn.kind, turn.granted.result())
        self._in_flight[turn.tree] -= 1
        if not self._in_flight[turn.tree]:
            del self._in_flight[turn.tree]
        self._grant()
        self.tell()
