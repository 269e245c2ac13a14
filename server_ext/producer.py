"""Grows queued prompts into scored trees: journal → forest → journal, for ever."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Concatenate, ParamSpec, TypeVar

from ibtree.errors import FieldError, PreconditionError
from ibtree.messages import Prompt
from ibtree.tree import Tree
from server_ext.engine import EngineError
from server_ext.forest import Forest
from server_ext.grow.grower import GrowthError
from server_ext.journal import Journal, Queued, State
from server_ext.rewards.base import GraderUnavailableError
from server_ext.tree_cache import NoReplyError

_log = logging.getLogger(__name__)
_KNOWN = (
    *(EngineError, GrowthError, FieldError, NoReplyError),
    *(GraderUnavailableError, PreconditionError),
)
"""Need no traceback."""
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


class Producer:
    """Takes queued prompts while there is room; `notify` it of new prompts.

    `decode` and `encode` turn the journal's bytes into a Prompt and a Tree into bytes.
    """

    def __init__(
        self,
        journal: JournalThread,
        forest: Forest,
        decode: Callable[[bytes], Prompt],
        encode: Callable[[Tree], bytes],
    ) -> None:
        self._journal, self._forest = journal, forest
        self._decode, self._encode = decode, encode
        self._wake = asyncio.Event()
        self._wake.set()  # the journal may hold prompts from before
        self._graded = asyncio.Condition()

    def notify(self) -> None:
        """New prompts may be queued."""
        self._wake.set()

    async def graded(self, timeout_s: float) -> None:
        """Returns when a tree was graded, or after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s), self._graded:
                await self._graded.wait()
        except TimeoutError:
            pass

    async def wake_leasers(self) -> None:
        """A tree is ready to be leased (graded, or given back)."""
        async with self._graded:
            self._graded.notify_all()

    async def run(self) -> None:
        """Until cancelled; then the trees that grow are queued again."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._wake.wait()
                await self._forest.places.acquire()
                self._wake.clear()  # before looking: a prompt that comes now sets it again
                queued = await self._journal(Journal.take, 1)
                if queued:
                    self._wake.set()
                    group.create_task(self._grow(queued[0]))
                else:
                    self._forest.places.release()

    async def _grow(self, queued: Queued) -> None:
        try:
            try:
                job = self._forest.check(self._decode(queued.prompt))
                tree = await self._forest.grow(job, lambda _: None, queued.submitted_at)
            finally:
                self._forest.places.release()
            await self._journal(Journal.store, queued.id, self._encode(tree))
            await self.wake_leasers()
        except asyncio.CancelledError:
            await self._journal(Journal.requeue, queued.id)
            raise
        except Exception as error:
            known = isinstance(error, _KNOWN)
            _log.warning("tree %s failed: %s", queued.id, error, exc_info=not known)
            state = await self._journal(Journal.fail, queued.id, f"{type(error).__name__}: {error}")
            if state is State.QUEUED:
                self.notify()
