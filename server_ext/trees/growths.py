"""Trees that grow for calls, and what becomes of one whose stream breaks.

           ┌──── a stream with its id takes it up, within a minute ────┐
           ▼                                                           │
       ATTACHED ────────── its stream ended, and it has an id ──────▶ DETACHED
           │ its stream ended, and it has none;                        │ nobody came in time;
           │ it failed; cancelled                                      │ it failed; cancelled
           └──────────────────────▶ ENDED ◀────────────────────────────┘
                       its rollouts are aborted, its answer is dropped

A stream that takes up a tree whose old stream is still there (nobody noticed that it broke) ends
the old one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from enum import Enum
from typing import Any

from ibtree.messages import Expansion
from ibtree.tree.options import check_length
from server_ext.errors import ConflictError, TakenUpError
from server_ext.trees.job import Job

_KEPT_S = 60.0
"""How long a tree waits for a stream that takes it up."""
_MOST_KEPT_BYTES = 64 * 1024 * 1024
"""Of trees that have ended and wait: beyond, the oldest are dropped."""
_TOLD_BYTES = 256
"""About what an expansion takes, or eight token ids."""
_MAX_ID_CHARACTERS = 256

Grow = Callable[[Job, Callable[[Expansion], None]], Coroutine[Any, Any, list[bytes]]]
"""Grows the job's tree, tells of its expansions, and returns the answer: messages as bytes."""


class State(Enum):
    ATTACHED = "attached"
    DETACHED = "detached"
    ENDED = "ended"


class Growth:
    """One call's tree, and the stream that it has now."""

    def __init__(self, call_id: str, content: bytes, job: Job, grow: Grow) -> None:
        """`content`: what was asked for, to know the call by."""
        self.call_id, self.content, self.job = call_id, content, job
        self.state = State.ATTACHED
        self.stream = 0
        """Number of the stream that it has; earlier ones are over."""
        self.timer: asyncio.TimerHandle | None = None
        """Ends it, while it is detached."""
        self._expansions: list[Expansion] = []
        self._news = asyncio.Event()
        self.task = asyncio.create_task(grow(job, self._emit))

    @property
    def failed(self) -> bool:
        """Whether there will be no answer."""
        return self.task.done() and (self.task.cancelled() or self.task.exception() is not None)

    @property
    def kept_bytes(self) -> int:
        """About what it holds when it has ended well: the answer, the prompt, what was told."""
        told = len(self._expansions) + len(self.job.token_ids) // 8 + 8
        return sum(map(len, self.task.result())) + len(self.content) + _TOLD_BYTES * told

    def _emit(self, event: Expansion) -> None:
        self._expansions.append(event)
        self.tell()

    def tell(self) -> None:
        """Something changed: streams look again."""
        self._news.set()

    async def expansions(
        self, stream: int, after: int, quiet_s: float
    ) -> AsyncIterator[Expansion | None]:
        """For stream number `stream`: those after the first `after`, as they come, until the tree
        is there; None when nothing came for `quiet_s`. Raises TakenUpError when another stream
        took the tree up."""
        sent = after if stream > 1 else 0  # one that is new has told nothing
        while True:
            self._news.clear()
            if self.stream != stream or self.state is not State.ATTACHED:
                raise TakenUpError("another call with this call_id took the tree up, or ended it")
            if sent < len(self._expansions):
                sent += 1
                yield self._expansions[sent - 1]
                continue
            if self.task.done():
                return
            try:
                await asyncio.wait_for(self._news.wait(), quiet_s)
            except TimeoutError:
                yield None


class Growths:
    """The trees that grow for calls; for one event loop."""

    def __init__(self) -> None:
        self._all: set[Growth] = set()
        self._by_id: dict[str, Growth] = {}
        self._kept: dict[Growth, int] = {}
        """Those that have ended well and are detached, the oldest first, with their bytes."""
        self._kept_bytes = 0
        self.growing = 0
        """Trees that grow, or wait for a permit or room."""

    def attach(self, call_id: str, content: bytes, job: Job, grow: Grow) -> Growth:
        """The growth of this call: one that waits for it, or a new one of this job. Pass it to
        `detach` when the stream has ended. Raises FieldError, and ConflictError for an id of a call
        with other content."""
        check_length("call_id", call_id, _MAX_ID_CHARACTERS)
        growth = self._by_id.get(call_id)
        if growth is None:
            growth = Growth(call_id, content, job, grow)
            growth.task.add_done_callback(lambda _: self._done(growth))
            self._all.add(growth)
            self.growing += 1
            if call_id:
                self._by_id[call_id] = growth
        elif growth.content != content:
            raise ConflictError(f"call_id {call_id!r} is that of a call for another tree")
        self._move(growth, State.ATTACHED)
        return growth

    async def detach(self, growth: Growth, stream: int, *, keep: bool) -> None:
        """Stream number `stream` has ended. `keep`: the tree may be taken up again. Else, and if it
        failed or has no id, returns when its rollouts are aborted."""
        if growth.stream != stream or growth.state is State.ENDED:
            return  # another one has it
        if keep and growth.call_id and not growth.failed:
            self._move(growth, State.DETACHED)
        else:
            await self._end(growth)

    async def cancel(self, call_id: str) -> None:
        """Ends the tree with this id, if it is there; returns when its rollouts are aborted."""
        if growth := self._by_id.get(call_id):
            await self._end(growth)

    def leave_out(self, begun: Callable[[Job], bool]) -> None:
        """Cancels the trees that have not begun to grow; their streams find them cancelled."""
        for growth in self._all:
            if not growth.task.done() and not begun(growth.job):
                growth.task.cancel()

    async def stop(self) -> None:
        """Ends them all."""
        await asyncio.gather(*(self._end(growth) for growth in [*self._all]))

    def _done(self, growth: Growth) -> None:
        """Its tree has ended. Nobody wants a failure that nobody waits for."""
        self.growing -= 1
        if growth.failed and growth.state is State.DETACHED:
            self._move(growth, State.ENDED)
        elif growth.state is State.DETACHED:
            self._keep(growth)
        growth.tell()

    async def _end(self, growth: Growth) -> None:
        self._move(growth, State.ENDED)
        await asyncio.wait({growth.task})

    def _move(self, growth: Growth, state: State) -> None:
        """Every transition of a growth."""
        if growth.timer:
            growth.timer.cancel()
            growth.timer = None
        growth.state = state
        self._kept_bytes -= self._kept.pop(growth, 0)
        match state:
            case State.ATTACHED:
                growth.stream += 1
            case State.DETACHED:
                loop = asyncio.get_running_loop()
                growth.timer = loop.call_later(_KEPT_S, self._move, growth, State.ENDED)
                if growth.task.done():
                    self._keep(growth)
            case State.ENDED:
                growth.task.cancel()
                self._all.discard(growth)
                if self._by_id.get(growth.call_id) is growth:
                    del self._by_id[growth.call_id]
        growth.tell()

    def _keep(self, growth: Growth) -> None:
        """Few of those are asked for: as far as the server knows, their answers came."""
        self._kept[growth] = growth.kept_bytes
        self._kept_bytes += self._kept[growth]
        while self._kept_bytes > _MOST_KEPT_BYTES:
            self._move(next(iter(self._kept)), State.ENDED)
