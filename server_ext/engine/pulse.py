"""Whether the engine's work moves, not only its processes: for health."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

_POLL_S = 1.0


class Pulse:
    """Looks at what is under way; if nothing is, has one token generated.

    A scheduler that is stopped, hangs in a kernel or waits for a dead rank answers nothing; a
    detokenizer that is stopped lets no token through.
    """

    def __init__(
        self,
        progress: Callable[[], int | None],
        passes: Callable[[], Awaitable[int]],
        is_held: Callable[[], bool],
        one_token: Callable[[], Awaitable[object]],
    ) -> None:
        """`progress`: a number that changes when a request gets on, None if there is none.
        `passes`: asks the scheduler for its prefill passes so far, of which a long prompt takes
        many before its first token. `is_held`: requests stand still, as they should while weights
        are switched. `one_token`: a request of its own."""
        self._progress, self._passes = progress, passes
        self._is_held, self._one_token = is_held, one_token

    async def beat(self) -> None:
        """Returns as soon as work was seen to move; it may never do so. Raises what `passes` and
        `one_token` raise."""
        before = self._progress()
        passes = await self._passes()
        while not self._is_held():
            now = self._progress()
            if now is None:
                await self._one_token()
                return
            if before is not None and now != before:
                return
            before = now
            await asyncio.sleep(_POLL_S)
            if await self._passes() != passes:
                return
