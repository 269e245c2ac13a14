"""The weight switch: which weights the engine holds, and whether rollouts run on them.

running ── paused() ──▶ held ── load() ──▶ loading ── all is in ──▶ on trial ──▶ running
   ▲                     │                  ▲    │                     │
   └── nothing loaded ───┘                  │    ├── not mended ──▶ broken
                                            │    │                     │
                                            └────┴──── load() ─────────┘

Loading: a part of a version may be in the engine. A load that failed stays there until a whole
version is loaded; a block that ends there leaves it broken. On trial: the version is whole, and a
further load() takes it back. Broken: rollouts wait for ever, only a new process heals it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Sequence, Set
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from server_ext.capacity.gate import Gate
from server_ext.errors import DrainTimeout, MixedWeightsError, RestartNeededError, StillBusy

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)
_BUCKET_BYTES = 256 * 1024 * 1024
_ANSWER_S = 600.0
"""An engine that takes longer for a call does not answer any more."""


class SwitchState(StrEnum):
    """Where a switch is in its life (the drawing above)."""

    RUNNING = "running"
    HELD = "held"
    LOADING = "loading"
    ON_TRIAL = "on trial"
    BROKEN = "broken"


_NEXT: dict[SwitchState, set[SwitchState]] = {
    SwitchState.RUNNING: {SwitchState.HELD},
    SwitchState.HELD: {SwitchState.LOADING, SwitchState.RUNNING, SwitchState.BROKEN},
    SwitchState.LOADING: {SwitchState.LOADING, SwitchState.ON_TRIAL, SwitchState.BROKEN},
    SwitchState.ON_TRIAL: {SwitchState.LOADING, SwitchState.RUNNING, SwitchState.BROKEN},
    SwitchState.BROKEN: {SwitchState.BROKEN},
}

Bucket = Sequence[tuple[str, "torch.Tensor"]]


class WeightPort(Protocol):
    """The engine's side of a switch. Tensors are loaded between `begin` and `end`; a second `begin`
    before the `end` is refused. Each raises EngineError if the engine refuses."""

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    async def begin(self) -> None: ...

    async def load(self, bucket: Bucket, label: str) -> None: ...

    async def end(self) -> None: ...


class Switch:
    """Switches weights under the rollouts that pass its gate. For one event loop."""

    def __init__(self, port: WeightPort, drain_timeout_s: float | None) -> None:
        """`drain_timeout_s`: how long rollouts in flight may take to end before an update; None:
        they are interrupted."""
        self._port, self.drain_timeout_s = port, drain_timeout_s
        self.gate = Gate()
        self.state = SwitchState.RUNNING
        self.broken = asyncio.Event()
        """Set in the state `broken`: the process is to end."""
        self._retracted = False
        self._loads, self._label, self._withdrawn = 0, "", set[str]()
        """Weight labels: how many there were; the one on trial, if any; those taken back."""

    def on_trial(self, labels: Set[str]) -> bool:
        """Whether weights of one of these labels may still be taken back."""
        return self._label in labels

    def withdrew(self, labels: Set[str]) -> bool:
        """Whether weights of one of these labels were taken back."""
        return not self._withdrawn.isdisjoint(labels)

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """No rollout runs inside, new ones wait. Those in flight finish first, or go back to the
        engine's queue with the tokens they have and go on afterwards.

        Raises DrainTimeout if they do not finish in time; MixedWeightsError if the block leaves
        half a version behind, RestartNeededError if the engine does not go on: rollouts then wait
        for ever.
        """
        try:
            async with self.gate.update(self.drain_timeout_s):
                if self.broken.is_set():
                    raise RestartNeededError("the engine is broken; the server has to be restarted")
                self._enter(SwitchState.HELD)
                try:
                    await self._retract()
                    yield
                except BaseException as error:
                    await self._leave(error)
                    raise
                else:
                    await self._leave(None)
        except StillBusy as error:
            raise DrainTimeout(f"{error}; nothing was applied") from error

    async def load(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Loads tensors, all of a version or those that changed; only inside `paused`. A second
        call inside one `paused` takes the first one's weights back.

        Raises EngineError and what `tensors` raises: the engine may then hold a mix, and a whole
        version has to be loaded before the block ends. Raises RestartNeededError if that is of no
        use any more.
        """
        await self._retract()
        self._withdrawn |= {self._label} - {""}
        self._loads += 1
        self._label = f"{version}.{self._loads}"
        self._enter(SwitchState.LOADING)
        async with self._session():
            buckets = in_buckets(tensors, _BUCKET_BYTES)
            # a thread reads the tensors, which may lie on a disk
            while bucket := await asyncio.to_thread(next, buckets, None):
                await self._answer("take weights", self._port.load(bucket, self._label))
        self._enter(SwitchState.ON_TRIAL)

    async def resume_on_trial(self) -> None:
        """Interrupted rollouts go on, new ones do not begin; after `load`, inside `paused`."""
        await self._resume()

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[None]:
        """The engine takes weights inside. Whatever happens there, the session is ended."""
        await self._begin()
        try:
            yield
        except RestartNeededError:
            raise  # nobody is there to end it
        except BaseException:
            try:
                await self._answer("end the update", self._port.end())
            except RestartNeededError:
                raise
            except Exception as error:  # what was raised first says more; `_begin` ends it
                _log.error("the engine did not end its weight update: %s", error)
            raise
        await self._answer("end the update", self._port.end())

    async def _begin(self) -> None:
        try:
            await self._answer("begin an update", self._port.begin())
        except RestartNeededError:
            raise
        except Exception as error:
            # the session of an update before this one may be open: its end did not get through
            _log.warning("the engine did not begin a weight update: %s; ending the last", error)
            try:
                await self._answer("end the update", self._port.end())
            except RestartNeededError:
                raise
            except Exception as refusal:
                _log.info("there was none to end: %s", refusal)
            await self._answer("begin an update", self._port.begin())

    async def _retract(self) -> None:
        if self.drain_timeout_s is None and not self._retracted:
            self._retracted = True  # whatever became of a pause that fails: it has to go on
            await self._answer("pause", self._port.pause())

    async def _resume(self) -> None:
        if self._retracted:
            await self._answer("go on", self._port.resume())
            self._retracted = False

    async def _answer(self, what: str, call: Awaitable[None]) -> None:
        """Raises RestartNeededError if the engine does not answer a call in time."""
        try:
            async with asyncio.timeout(_ANSWER_S) as deadline:
                await call
        except TimeoutError as error:
            if not deadline.expired():
                raise
            self._enter(SwitchState.BROKEN)
            problem = f"the engine did not {what} within {_ANSWER_S:g} s"
            raise RestartNeededError(problem) from error

    async def _leave(self, error: BaseException | None) -> None:
        """The end of a `paused`, with what was raised inside."""
        self._label = ""
        if isinstance(error, RestartNeededError):
            self._enter(SwitchState.BROKEN)
        elif self.state is SwitchState.LOADING:
            self._enter(SwitchState.BROKEN)
            raise MixedWeightsError("half a weight version is in the engine") from error
        else:
            try:
                await self._resume()
            except Exception as problem:
                self._enter(SwitchState.BROKEN)
                raise RestartNeededError(f"the engine does not go on: {problem}") from problem
            self._enter(SwitchState.RUNNING)

    def _enter(self, state: SwitchState) -> None:
        """The one statement that changes the state."""
        if state not in _NEXT[self.state]:
            raise RuntimeError(f"the weight switch is {self.state}: it cannot become {state}")
        self.state = state
        if state is SwitchState.BROKEN:
            self.gate.shut()
            self.broken.set()


def in_buckets(
    tensors: Iterable[tuple[str, torch.Tensor]], most_bytes: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """The tensors in lists of at most so many bytes; a larger one is alone in its list."""
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > most_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket
