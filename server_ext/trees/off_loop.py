"""Work that grows with its input, beside the event loop.

Threads and the loop take turns at the interpreter's lock, and a thread that works keeps it for a
whole switch interval. So each kind of work has one thread: more would not be faster, and the loop
would wait for every one of them in turn (asyncio's own pool has up to 32).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_FEW_TOKENS = 256
"""Fewer are worked on at once: a tenth of a millisecond, about what handing them over costs."""


class OffLoop:
    """One thread, which takes its work in order: `await off_loop(work, …)`."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def __call__(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        call = partial(work, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    async def of_tokens(
        self, count: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Work on the text of `count` tokens."""
        if count < _FEW_TOKENS:
            return work(*args, **kwargs)
        return await self(work, *args, **kwargs)
