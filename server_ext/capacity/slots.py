"""Slots for rollouts in the engine, divided between the growing trees."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Slots:
    """A free slot goes to an urgent tree first, then to the tree with the fewest rollouts in
    flight, then to the one that has waited longest. For one event loop."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._in_flight: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._urgent: set[str] = set()
        self._idle: list[asyncio.Future[None]] = []
        """Those who wait for slots that nobody claims."""

    @property
    def unclaimed(self) -> int:
        """Slots that are free although no rollout waits."""
        return 0 if self._waiting else self._free

    async def changed(self) -> None:
        """Returns when a slot was given, left, or claimed."""
        change: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._idle.append(change)
        await change

    def tell(self) -> None:
        """Wakes those who wait for a change."""
        waiting, self._idle = self._idle, []
        for change in waiting:
            if not change.done():
                change.set_result(None)

    @property
    def in_flight(self) -> int:
        """Rollouts that have a slot now."""
        return self._in_flight.total()

    @asynccontextmanager
    async def slot(self, tree: str, *, urgent: bool = False) -> AsyncIterator[None]:
        """Waits until a rollout of the tree has its turn; it has the slot for the block."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tree, deque()).append(turn)
        if urgent:
            self._urgent.add(tree)
        self._grant()
        self.tell()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._release(tree)
            else:
                self._forget(tree, turn)

    def give_up(self, tree: str) -> None:
        """Cancels the tree's rollouts that still wait."""
        for turn in self._waiting.pop(tree, ()):
            turn.cancel()

    def _grant(self) -> None:
        while self._free and self._waiting:
            tree = min(self._waiting, key=lambda t: (t not in self._urgent, self._in_flight[t]))
            turn = self._waiting[tree][0]
            self._forget(tree, turn)
            if not turn.cancelled():  # its task was cancelled, and has not run since
                self._free -= 1
                self._in_flight[tree] += 1
                turn.set_result(None)

    def _forget(self, tree: str, turn: asyncio.Future[None]) -> None:
        """The turn is no longer waited for."""
        line = self._waiting.get(tree, deque())
        if turn in line:
            line.remove(turn)
            # a tree that goes on waiting stands behind those that wait already
            del self._waiting[tree]
            if line:
                self._waiting[tree] = line

    def _release(self, tree: str) -> None:
        self._free += 1
        self._in_flight[tree] -= 1
        if not self._in_flight[tree]:
            del self._in_flight[tree]
            if tree not in self._waiting:
                self._urgent.discard(tree)
        self._grant()
        self.tell()
