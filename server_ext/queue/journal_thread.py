"""The journal off the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

from server_ext.errors import DiskFullError, JournalAwayError
from server_ext.queue.journal import Journal

P = ParamSpec("P")
T = TypeVar("T")
_MOST_TOGETHER = 64


class JournalThread:
    """The journal on the one thread it may be used from: `await call(Journal.lease, …)`.

    Calls that wait together are one transaction on disk: what makes it durable costs as much for
    64 as for one. Each still fails by itself.
    """

    def __init__(self, open_journal: Callable[[], Journal]) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._journal = self._executor.submit(open_journal).result()
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()

    async def __call__(
        self, method: Callable[Concatenate[Journal, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        future: Future[T] = Future()
        self._waiting.append((partial(method, self._journal, *args, **kwargs), future))
        self._executor.submit(self._work)
        # shielded: a cancelled caller must not lose track of a transaction that still commits
        return await asyncio.shield(asyncio.wrap_future(future))

    def close(self) -> None:
        self._executor.submit(self._journal.close).result()
        self._executor.shutdown()

    def _work(self) -> None:
        """Does what waits, if an earlier turn has not done it already."""
        count = min(len(self._waiting), _MOST_TOGETHER)
        batch = [self._waiting.popleft() for _ in range(count)]
        calls = [call for call, _ in batch]
        answers = self._together(calls) if count > 1 else None
        if answers is None:
            answers = [_answer(call) for call in calls]
        for (_, future), (value, error) in zip(batch, answers, strict=True):
            if error:
                future.set_exception(error)
            else:
                future.set_result(value)

    def _together(self, calls: list[Callable[[], Any]]) -> list[_Answer] | None:
        """The calls as one transaction; None, and nothing is changed, if the disk has no room for
        all of them: some may still go through by themselves."""
        answers: list[_Answer] = []
        try:
            with self._journal.together():
                for call in calls:
                    answers.append(_answer(call))
                    self._journal.check_together()
        except (DiskFullError, JournalAwayError):
            return None
        return answers


_Answer = tuple[Any, BaseException | None]
"""What a call returned, or raised."""


def _answer(call: Callable[[], Any]) -> _Answer:
    try:
        return call(), None
    except BaseException as error:
        return None, error
