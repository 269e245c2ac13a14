"""Grows queued prompts into scored trees: journal → forest → journal, for ever."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ibtree.errors import IbtpoError
from ibtree.messages import Prompt
from ibtree.tree import Tree
from server_ext.queue.journal import Journal, Queued, State
from server_ext.queue.journal_thread import JournalThread
from server_ext.trees.forest import Forest
from server_ext.trees.job import Job

_log = logging.getLogger(__name__)


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
        """Runs until cancelled; then the trees that grow are queued again."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._wake.wait()
                await self._forest.permits.acquire()
                await self._forest.wants_tree()
                self._wake.clear()  # before looking: a prompt that comes now sets it again
                queued = await self._journal(Journal.take, 1)
                if queued:
                    self._wake.set()
                    group.create_task(self._grow(queued[0]))
                else:
                    self._forest.permits.release()

    async def _grown(self, queued: Queued) -> Tree:
        """The prompt's tree. Until it begins, its first rollouts count as claimed."""
        first = self._forest.defaults.init_rollouts
        self._forest.expect(first)

        def began() -> None:
            nonlocal first
            self._forest.expect(-first)
            first = 0

        try:
            job = await self._forest.off_loop(self._job, queued.prompt)
            return await self._forest.grow(job, lambda _: None, queued.submitted_at, began)
        finally:
            began()

    def _job(self, prompt: bytes) -> Job:
        return self._forest.check(self._decode(prompt))

    async def _grow(self, queued: Queued) -> None:
        try:
            try:
                tree = await self._grown(queued)
            finally:
                self._forest.permits.release()
            encoded = await self._forest.off_loop(self._encode, tree)
            await self._journal(Journal.store, queued.id, encoded)
            await self.wake_leasers()
        except asyncio.CancelledError:
            await self._journal(Journal.requeue, queued.id)
            raise
        except Exception as error:
            expected = isinstance(error, IbtpoError)
            _log.warning("tree %s failed: %s", queued.id, error, exc_info=not expected)
            state = await self._journal(Journal.fail, queued.id, f"{type(error).__name__}: {error}")
            if state is State.QUEUED:
                self.notify()
