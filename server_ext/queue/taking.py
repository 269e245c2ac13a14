"""Whether prompts are taken out of the queue to be grown."""

from __future__ import annotations

import asyncio


class Taking:
    """Prompts are taken while nobody holds them back. For one event loop.

    taking ── hold ──▶ held by one or more ── release by the last ──▶ taking
    """

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}
        """Why, by who holds it."""
        self._free = asyncio.Event()
        self._free.set()

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why nothing is taken, in the order in which it was held; empty: prompts are taken."""
        return tuple(f"{who}: {why}" for who, why in self._reasons.items())

    def held_by(self, who: str) -> bool:
        """Whether this one holds it."""
        return who in self._reasons

    def hold(self, who: str, why: str) -> None:
        """Nothing more is taken until `who` releases it; holding it twice is holding it once, for
        the last reason given."""
        self._reasons[who] = why
        self._free.clear()

    def release(self, who: str) -> None:
        """This one has nothing against it any more; it changes nothing if it did not hold it."""
        self._reasons.pop(who, None)
        if not self._reasons:
            self._free.set()

    async def allowed(self) -> None:
        """Returns when prompts are taken."""
        while self._reasons:  # another reason may come before this one wakes up
            await self._free.wait()
