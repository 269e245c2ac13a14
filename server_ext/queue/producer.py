"""Grows queued prompts into scored trees: journal → forest → journal, for ever.

How a growth ends, and whose fault that is (states.py draws where it leads):

graded       the tree is stored; a full disk makes it wait in memory, and no prompt is taken
interrupted  engine, grader, disk or we ourselves: not counted, tried again after a pause; the
             breaker hears of it
failed       the prompt or the tree: counted. Our own mistake counts too if other trees were
             graded meanwhile: then it is this one that we cannot grow
stopped      the server stops: queued again as if nothing had been
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Concatenate, ParamSpec, TypeVar

from ibtree.errors import Fault, IbtpoError
from ibtree.messages import Prompt
from ibtree.tree import Tree
from server_ext.capacity.grace import kept
from server_ext.errors import (
    DiskFullError,
    GraderUnavailableError,
    JournalAwayError,
    NotGrowingError,
)
from server_ext.queue.breaker import ENGINE, grader_name
from server_ext.queue.intake import Intake
from server_ext.queue.journal import Journal, Queued
from server_ext.queue.journal_thread import JournalThread
from server_ext.queue.states import State, run_of
from server_ext.queue.taking import Taking
from server_ext.trees.forest import Forest
from server_ext.trees.job import Job

_log = logging.getLogger(__name__)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
P = ParamSpec("P")
T = TypeVar("T")
STOP, OPERATOR = "stop", "operator"
"""Who may hold the queue, beside what `intake` sees."""


class Outcome(StrEnum):
    """How a growth ended."""

    GRADED = "graded"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    DEAD = "dead"
    """Failed, and for the last time."""


@dataclass(eq=False)
class _Growth:
    """A prompt on its way: it is read (no job yet), its tree grows, the tree is stored (grown)."""

    queued: Queued
    graded_before: int
    """Trees graded when it was taken."""
    job: Job | None = None
    grown: bool = False
    task: asyncio.Task[None] | None = None
    cancelled: bool = False
    """Nobody wants it any more, and the journal has forgotten it."""

    @property
    def grader(self) -> str:
        """Empty while the prompt is read."""
        return self.job.grader if self.job else ""


class Producer:
    """Takes queued prompts while there is room, and neither `intake` nor `taking` holds it up;
    `notify` it of new prompts.

    `decode` and `encode` turn the journal's bytes into a Prompt and a Tree into bytes; `ended` is
    told how each growth ended.
    """

    def __init__(
        self,
        journal: JournalThread,
        forest: Forest,
        decode: Callable[[bytes], Prompt],
        encode: Callable[[Tree], bytes],
        intake: Intake | None = None,
        ended: Callable[[Outcome], None] = lambda _: None,
    ) -> None:
        self._journal, self._forest = journal, forest
        self._decode, self._encode, self._ended = decode, encode, ended
        self.intake = intake or Intake(journal)
        self.taking = Taking()
        self._growths: dict[str, _Growth] = {}
        self._graded_trees = 0
        self._wake = asyncio.Event()
        self._wake.set()  # the journal may hold prompts from before
        self._graded = asyncio.Condition()

    @property
    def stopping(self) -> bool:
        """Whether the trees that grow are the last ones."""
        return self.taking.held_by(STOP)

    @property
    def holds(self) -> tuple[str, ...]:
        """Why prompts are not taken now; empty: they are."""
        return (*sorted(self.intake.holds), *self.taking.reasons)

    def notify(self) -> None:
        """There may be something to take: new prompts, or room where there was none."""
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

    def abandon(self, ids: Collection[str], run: str | None) -> None:
        """Stops the growth of these prompts, else of a run's, else of all, and has the journal hear
        no more of them: it is about to forget them."""
        named = set(ids)
        for id_, growth in list(self._growths.items()):
            chosen = id_ in named if named else run is None or run_of(id_) == run
            if chosen:
                growth.cancelled = True
                if growth.task:
                    growth.task.cancel()

    async def run(self) -> None:
        """Runs until cancelled; then the trees that grow are queued again."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._something_to_take()
                await self._forest.permits.acquire()
                await self._forest.wants_tree()
                await self.taking.allowed()
                queued = await self._next()
                if queued is None:
                    self._forest.permits.release()
                    continue
                growth = _Growth(queued, self._graded_trees)
                self._growths[queued.id] = growth
                growth.task = group.create_task(self._grow(growth))

    async def drain(self, grace_s: float) -> None:
        """Takes nothing more, and returns when no tree grows. The grace goes to the trees nearest
        to their end (grace.py); the others, and those that have not ended after it, are queued
        again."""
        self.taking.hold(STOP, "the server is stopping")
        await self.wake_leasers()
        left_s: dict[asyncio.Task[None], float | None] = {}
        for growth in self._growths.values():
            if growth.task and growth.grown:
                left_s[growth.task] = 0.0
            elif growth.task and growth.job and self._forest.has_begun(growth.job):
                left_s[growth.task] = self._forest.left_s(growth.job)
        stay = set(kept(left_s, grace_s, beside=self._forest.calls.growing))
        given_up = self._tasks() - stay
        _log.info("%d trees may end, %d are queued again", len(stay), len(given_up))
        for task in given_up:
            task.cancel()
        if tasks := self._tasks():
            await asyncio.wait(tasks, timeout=grace_s)
        await self.give_up()

    async def idle(self, timeout_s: float) -> int:
        """Returns when no queued prompt's tree grows, or after `timeout_s`; how many then do."""
        until = time.monotonic() + timeout_s
        while (tasks := self._tasks()) and (left_s := until - time.monotonic()) > 0:
            await asyncio.wait(tasks, timeout=left_s)
        return len(tasks)

    async def give_up(self) -> None:
        """Queues every tree that grows again."""
        if tasks := self._tasks():
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _tasks(self) -> set[asyncio.Task[None]]:
        return {growth.task for growth in self._growths.values() if growth.task}

    async def _something_to_take(self) -> None:
        """Returns when somebody said so, or when a prompt has rested."""
        if self._wake.is_set():
            return
        rest_s = None
        with suppress(DiskFullError, JournalAwayError):
            rest_s = await self._journal(Journal.rest_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(rest_s):
                await self._wake.wait()

    async def _next(self) -> Queued | None:
        """The next prompt, if one may be taken; waits a little if none may."""
        self._wake.clear()  # before looking: a prompt that comes now sets it again
        growing = Counter(run_of(id_) for id_ in self._growths)
        try:
            verdict = await self.intake.look(growing)
            if not verdict.open:
                with suppress(TimeoutError):
                    async with asyncio.timeout(verdict.wait_s):
                        await self._wake.wait()
                self._wake.set()
                return None
            taken = await self._journal(Journal.take, 1, verdict.held_runs)
        except (DiskFullError, JournalAwayError) as error:
            _log.warning("no prompt can be taken: %s", error)
            await asyncio.sleep(_FIRST_PAUSE_S)
            self._wake.set()
            return None
        if not taken:
            return None
        self._wake.set()
        self.intake.breaker.taken()
        return taken[0]

    async def _grown(self, growth: _Growth) -> Tree:
        """The prompt's tree. Until it begins, its first rollouts count as claimed."""
        first = self._forest.defaults.init_rollouts
        self._forest.expect(first)

        def began() -> None:
            nonlocal first
            self._forest.expect(-first)
            first = 0

        try:
            job = growth.job = await self._forest.off_loop(self._job, growth.queued.prompt)
            submitted_at = time.time() - growth.queued.waited_s
            return await self._forest.grow(job, lambda _: None, submitted_at, began)
        finally:
            began()

    def _job(self, prompt: bytes) -> Job:
        return self._forest.check(self._decode(prompt))

    def _encoded(self, tree: Tree) -> tuple[bytes, int]:
        return self._encode(tree), tree.oldest_version

    async def _grow(self, growth: _Growth) -> None:
        id_ = growth.queued.id
        try:
            try:
                await self.taking.allowed()  # perhaps not any more
                tree = await self._grown(growth)
            finally:
                self._forest.permits.release()
            growth.grown = True
            encoded, version = await self._forest.off_loop(self._encoded, tree)
            await self._durably(Journal.store, id_, encoded, version)
            self._graded_trees += 1
            self.intake.breaker.graded(growth.grader)
            self._ended(Outcome.GRADED)
            await self.wake_leasers()
        except asyncio.CancelledError:
            if not growth.cancelled:  # the server stops; on a full disk the next start does it
                with suppress(DiskFullError, JournalAwayError):
                    await self._journal(Journal.requeue, id_)
                raise
            self.intake.breaker.told_nothing()
        except NotGrowingError as error:
            _log.info("%s", error)
            self.intake.breaker.told_nothing()
        except Exception as error:
            with suppress(NotGrowingError):  # cancelled meanwhile
                await self._unsuccessful(growth, error)
        finally:
            if self._growths.get(id_) is growth:  # else it was cancelled, and submitted again
                del self._growths[id_]
            self.notify()

    async def _unsuccessful(self, growth: _Growth, error: Exception) -> None:
        """Writes down how the growth ended, and against whom it counts."""
        id_, reason = growth.queued.id, f"{type(error).__name__}: {error}"
        fault = error.fault if isinstance(error, IbtpoError) else Fault.OURS
        ours = fault is Fault.OURS
        trace = error if ours else None
        if fault is Fault.DEPENDENCY or (ours and self._graded_trees == growth.graded_before):
            rest_s = await self._durably(Journal.interrupt, id_, reason)
            words = "tree %r was interrupted, and rests %.0f s: %r"
            _log.warning(words, id_, rest_s, reason, exc_info=trace)
            if ours:
                self.intake.breaker.told_nothing()
            else:
                by_grader = isinstance(error, GraderUnavailableError)
                what = grader_name(growth.grader) if by_grader else ENGINE
                self.intake.breaker.failed(what, str(error))
            self._ended(Outcome.INTERRUPTED)
            return
        state = await self._durably(Journal.fail, id_, reason)
        _log.warning("tree %r failed, and is %s: %r", id_, state, reason, exc_info=trace)
        self.intake.breaker.told_nothing()
        self._ended(Outcome.DEAD if state is State.DEAD else Outcome.FAILED)

    async def _durably(
        self, method: Callable[Concatenate[Journal, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Calls the journal until its disk has room: what is told here must not be lost."""
        pause_s, waited = _FIRST_PAUSE_S, False
        try:
            while True:
                try:
                    return await self._journal(method, *args, **kwargs)
                except (DiskFullError, JournalAwayError) as error:
                    if not waited:
                        _log.warning("%s; it is tried again", error)
                        self.intake.unwritten += 1
                        waited = True
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        finally:
            self.intake.unwritten -= waited
