"""Grows queued prompts into scored trees: journal → forest → journal, for ever."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ibtree.errors import IbtpoError
from ibtree.messages import Prompt
from ibtree.tree import Tree
from server_ext.capacity.grace import kept
from server_ext.queue.journal import Journal, Queued, State
from server_ext.queue.journal_thread import JournalThread
from server_ext.queue.taking import Taking
from server_ext.trees.forest import Forest
from server_ext.trees.job import Job

_log = logging.getLogger(__name__)
STOP, OPERATOR = "stop", "operator"
"""Who may hold the queue, beside others."""


@dataclass(eq=False)
class _Growth:
    """A prompt on its way: it is read (no job yet), its tree grows, the tree is stored (grown)."""

    job: Job | None = None
    grown: bool = False


class Producer:
    """Takes queued prompts while there is room and `taking` allows it; `notify` it of new prompts.

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
        self.taking = Taking()
        self._growing: dict[asyncio.Task[Any], _Growth] = {}

    @property
    def stopping(self) -> bool:
        """Whether the trees that grow are the last ones."""
        return self.taking.held_by(STOP)

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
                await self.taking.allowed()
                self._wake.clear()  # before looking: a prompt that comes now sets it again
                queued = await self._journal(Journal.take, 1)
                if queued:
                    self._wake.set()
                    group.create_task(self._grow(queued[0]))
                else:
                    self._forest.permits.release()

    async def drain(self, grace_s: float) -> None:
        """Takes nothing more, and returns when no tree grows. The grace goes to the trees nearest
        to their end (grace.py); the others, and those that have not ended after it, are queued
        again."""
        self.taking.hold(STOP, "the server is stopping")
        await self.wake_leasers()
        left_s: dict[asyncio.Task[Any], float | None] = {}
        for task, growth in self._growing.items():
            if growth.grown:
                left_s[task] = 0.0
            elif growth.job and self._forest.has_begun(growth.job):
                left_s[task] = self._forest.left_s(growth.job)
        stay = set(kept(left_s, grace_s, beside=self._forest.calls.growing))
        given_up = [task for task in self._growing if task not in stay]
        _log.info("%d trees may end, %d are queued again", len(stay), len(given_up))
        for task in given_up:
            task.cancel()
        if self._growing:
            await asyncio.wait(list(self._growing), timeout=grace_s)
        await self.give_up()

    async def idle(self, timeout_s: float) -> int:
        """Returns when no queued prompt's tree grows, or after `timeout_s`; how many then do."""
        until = time.monotonic() + timeout_s
        while self._growing and (left_s := until - time.monotonic()) > 0:
            await asyncio.wait(list(self._growing), timeout=left_s)
        return len(self._growing)

    async def give_up(self) -> None:
        """Queues every tree that grows again."""
        for task in self._growing:
            task.cancel()
        if self._growing:
            await asyncio.wait(list(self._growing))

    async def _grown(self, queued: Queued, growth: _Growth) -> Tree:
        """The prompt's tree. Until it begins, its first rollouts count as claimed."""
        first = self._forest.defaults.init_rollouts
        self._forest.expect(first)

        def began() -> None:
            nonlocal first
            self._forest.expect(-first)
            first = 0

        try:
            job = growth.job = await self._forest.off_loop(self._job, queued.prompt)
            return await self._forest.grow(job, lambda _: None, queued.submitted_at, began)
        finally:
            began()

    def _job(self, prompt: bytes) -> Job:
        return self._forest.check(self._decode(prompt))

    async def _grow(self, queued: Queued) -> None:
        task, growth = asyncio.current_task(), _Growth()
        assert task
        self._growing[task] = growth
        try:
            try:
                await self.taking.allowed()  # perhaps not any more
                tree = await self._grown(queued, growth)
            finally:
                self._forest.permits.release()
            growth.grown = True
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
        finally:
            del self._growing[task]
