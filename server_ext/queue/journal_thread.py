"""The journal off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Concatenate, ParamSpec, TypeVar

from server_ext.queue.journal import Journal

P = ParamSpec("P")
T = TypeVar("T")


class JournalThread:
    """The journal on the one thread it may be used from: `await call(Journal.lease, …)`."""

    def __init__(self, open_journal: Callable[[], Journal]) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._journal = self._executor.submit(open_journal).result()

    async def __call__(
        self, method: Callable[Concatenate[Journal, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        call = partial(method, self._journal, *args, **kwargs)
        # shielded: a cancelled caller must not lose track of a transaction that still commits
        return await asyncio.shield(
            asyncio.get_running_loop().run_in_executor(self._executor, call)
        )

    def close(self) -> None:
        self._executor.submit(self._journal.close).result()
        self._executor.shutdown()
