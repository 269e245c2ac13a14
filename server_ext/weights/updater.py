"""The life of a pushed weight version.

announced ─▶ received ─▶ verified ─▶ staged ─▶ applied ─▶ serving
    │            │           │          │         │
    └────────────┴───────────┴──────────┴─────────┴──▶ rejected   (the old version serves on)

Verified: the host copy holds its tensors, to the bit. Staged: its file is durable. Applied: the
engine holds them; its canary is scored then. A rollback is a new version made of an old one's
files: it goes from announced to verified.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from ibtree.errors import PreconditionError
from ibtree.messages import PushOutcome, RollbackOutcome
from ibtree.weights.manifest import Canary, TensorSpec, WeightManifest
from server_ext.engine.port import Engine
from server_ext.errors import MixedWeightsError, RestartNeededError
from server_ext.weights.canary import check_canary, check_sizes
from server_ext.weights.host_copy import HostCopy
from server_ext.weights.inbox import Inbox, Source, remove
from server_ext.weights.manifest import (
    check_base,
    check_number,
    check_run,
    check_size,
    check_tensors,
    check_version,
)
from server_ext.weights.store import Serving, StoredWeights, WeightStore

_log = logging.getLogger(__name__)
T = TypeVar("T")


class WeightState(StrEnum):
    """Names as in protos/ibtree/v1/weights.proto, in lower case."""

    ANNOUNCED = "announced"
    RECEIVED = "received"
    VERIFIED = "verified"
    STAGED = "staged"
    APPLIED = "applied"
    SERVING = "serving"
    REJECTED = "rejected"


class WeightUpdater:
    """Receives pushes beside each other, and takes one of them or a rollback at a time."""

    def __init__(
        self,
        engine: Engine,
        store: WeightStore,
        model_dir: Path,
        specs: Mapping[str, TensorSpec],
        model_id: str,
        push_idle_timeout_s: float = 60.0,
    ) -> None:
        """`specs`: the model folder's tensors (names and shapes); the dtype is the engine's.
        `push_idle_timeout_s`: how long a push may send nothing."""
        self._engine, self._store = engine, store
        self._specs, self.model_id = specs, model_id
        self._lock = asyncio.Lock()
        self._tidying: asyncio.Future[None] | None = None
        self.push_idle_timeout_s = push_idle_timeout_s
        self._inbox = Inbox(store.folder, store.spare, push_idle_timeout_s)
        self._host = HostCopy(store, model_dir)
        self.serving = Serving()
        self.state, self._announced = WeightState.SERVING, 0
        self.pause_s = 0.0
        """How long no rollout could run at the last update."""

    @property
    def broken(self) -> asyncio.Event:
        """Set when a mix of weights may be loaded, or the engine is gone: the process must end."""
        return self._engine.broken

    @property
    def dtype(self) -> str:
        """safetensors dtype that is taken."""
        return self._engine.dtype

    @property
    def retained(self) -> tuple[StoredWeights, ...]:
        """Versions that can be gone back to, oldest first; the last one serves."""
        return self._store.retained

    async def restore(self) -> None:
        """Serves the version that served before a restart. Raises FieldError if it is damaged."""
        if self._store.retained:
            await asyncio.to_thread(self._host.load, self._store.retained[-1])
            async with self._engine.paused():
                await self._engine.load(self._host.served(), self._store.serving().version)
            self.serving = self._store.serving()
            _log.info("serving weight version %s again", self.serving.version)

    async def push(self, manifest: WeightManifest, source: Source) -> PushOutcome:
        """Receives, checks and serves a version; returns when it serves. Others may be received at
        the same time; from then on one follows the other.

        Raises PreconditionError (another model or base, not newer, tensors that do not fit, a
        canary that fails), FieldError (bytes that do not match the manifest), PushEndedError (by a
        newer push, a rollback, `abort`), EngineError (not applied), RestartNeededError, and what
        the source raises.
        """
        version = manifest.version
        await asyncio.to_thread(lambda: manifest.digest)  # hashes what has thousands of names
        if self._serves(manifest):
            return PushOutcome(version, WeightState.SERVING, manifest.digest, 0.0)
        with self._rejected_if_it_fails(version):
            self._enter(WeightState.ANNOUNCED, version)
            await asyncio.to_thread(self._check, manifest, settled=not self._lock.locked())
            path = await self._inbox.receive(manifest, source)
            self._enter(WeightState.RECEIVED, version)
        return await self._in_turn(lambda: self._take(manifest, path))

    async def rollback(self, to_version: int | None = None) -> RollbackOutcome:
        """Serves a kept version's tensors again, as the version after the served one; by default
        those of the newest that differs. Ends pushes that are still being received.

        Raises PreconditionError, FieldError, EngineError, RestartNeededError."""
        self._target(to_version)
        self._inbox.end("a rollback")
        return await self._in_turn(lambda: self._go_back(to_version))

    def abort(self, version: int | None = None) -> list[int]:
        """Ends pushes that are still being received, or those of one version; their versions."""
        return self._inbox.end("an operator", version)

    async def _in_turn(self, work: Callable[[], Awaitable[T]]) -> T:
        """Runs it when nothing else changes the weights, and to the end, whether the caller waits
        or not: half a version must not stay in the engine."""

        async def whole() -> T:
            await self._lock.acquire()
            try:
                return await work()
            finally:
                self._tidying = asyncio.ensure_future(self._tidied())

        return await asyncio.shield(asyncio.ensure_future(whole()))

    async def _tidied(self) -> None:
        """The end of a turn; large files take their time."""
        try:
            if not self.broken.is_set():
                await asyncio.to_thread(self._store.drop)
        finally:
            self._lock.release()

    async def _take(self, manifest: WeightManifest, path: Path) -> PushOutcome:
        """Takes a version from received to serving."""
        version, pause_s = manifest.version, 0.0
        try:
            with self._rejected_if_it_fails(version):
                if not self._serves(manifest):  # it may by now
                    await asyncio.to_thread(self._check, manifest, settled=True)
                    await asyncio.to_thread(path.replace, self._store.staging)
                    pause_s = await self._take_staged(manifest)
            self._enter(WeightState.SERVING, version)
        finally:
            await asyncio.to_thread(remove, path, self._store.staging)
        return PushOutcome(version, WeightState.SERVING, manifest.digest, pause_s)

    async def _take_staged(self, manifest: WeightManifest) -> float:
        """Takes a version from the staging file to applied; returns the pause [s]."""
        before = self._host.specs_of(self.serving)
        try:
            # the disk writes while the processor hashes; neither may go on after the other failed
            verifying = asyncio.to_thread(self._host.receive, manifest)
            writing = asyncio.to_thread(self._store.sync_staging)
            for done in await asyncio.gather(verifying, writing, return_exceptions=True):
                if isinstance(done, BaseException):
                    raise done
            self._enter(WeightState.VERIFIED, manifest.version)
            stored = await asyncio.to_thread(self._stage, manifest)
            self._enter(WeightState.STAGED, manifest.version)
            return await self._apply(stored, self._host.changed(before), manifest.canary)
        except Exception:
            await asyncio.to_thread(self._host.reload_served)
            raise

    async def _go_back(self, to_version: int | None) -> RollbackOutcome:
        """Takes a rollback from announced to serving."""
        target, version = self._target(to_version), self.serving.version + 1
        check_number(version)
        with self._rejected_if_it_fails(version):
            self._enter(WeightState.ANNOUNCED, version)
            pause_s = await self._restore_kept(target, version)
        self._enter(WeightState.SERVING, version)
        return RollbackOutcome(version, target.version, target.digest, pause_s)

    async def _restore_kept(self, target: StoredWeights, version: int) -> float:
        """Takes a kept version's tensors from verified to applied; returns the pause [s]."""
        before = self._host.specs_of(self.serving)
        stored = replace(target, version=version, restored_version=target.version)
        try:
            await asyncio.to_thread(self._host.load, target)
            self._host.version = Serving(version, target.digest)
            self._enter(WeightState.VERIFIED, version)
            self._enter(WeightState.STAGED, version)  # its files have been there all the time
            return await self._apply(stored, self._host.changed(before), None)
        except Exception:
            await asyncio.to_thread(self._host.reload_served)
            raise

    @contextmanager
    def _rejected_if_it_fails(self, version: int) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._enter(WeightState.REJECTED, version)
            raise

    def _serves(self, manifest: WeightManifest) -> bool:
        return Serving(manifest.version, manifest.digest) == self.serving

    def _enter(self, state: WeightState, version: int) -> None:
        """The one statement that changes a version's state; `state` is that of the newest one."""
        _log.info("weight version %s: %s", version, state)
        if state is WeightState.ANNOUNCED:
            self._announced = version
        if version == self._announced:
            self.state = state

    def _check(self, manifest: WeightManifest, *, settled: bool) -> None:
        """Raises PreconditionError or FieldError unless it can follow the served version. Whether
        that is its base is asked only if no other version is on its way into the engine."""
        if manifest.model_id != self.model_id:
            raise PreconditionError(
                f"model_id: the weights are of model {manifest.model_id[:12]}…, this server runs "
                f"{self.model_id[:12]}…; start the learner from the same model folder"
            )
        check_version(manifest, self.serving)
        check_run(manifest, self.retained)
        check_tensors(manifest, self._specs, self.dtype)
        if settled:
            check_base(manifest, self.serving, self._host.version)
        check_size(manifest)
        if manifest.canary:
            check_sizes(manifest.canary, self._engine.context_tokens)

    def _stage(self, manifest: WeightManifest) -> StoredWeights:
        """Makes the version durable."""
        delta = manifest.base_version is not None and self._store.takes_delta()
        if manifest.base_version is not None and not delta:
            self._store.spare.unlink(missing_ok=True)  # the disk may have no room for both
            self._host.write(self._store.staging)
        size = self._store.staging.stat().st_size
        files = self._store.keep(manifest.version, delta=delta)
        base = manifest.base_version if delta else None
        return StoredWeights(
            manifest.version, manifest.digest, size, 0.0, base, None, manifest.run_id, files=files
        )

    async def _apply(
        self, stored: StoredWeights, changed: Iterable[str], canary: Canary | None
    ) -> float:
        """Loads and serves the version; no rollout begins from the first tensor until it serves or
        the old one is back. Returns the pause [s]."""
        before = self._store.retained
        async with self._engine.paused():
            begin = time.monotonic()
            try:
                await self._engine.load(self._host.tensors(changed), stored.version)
                self._enter(WeightState.APPLIED, stored.version)
                if canary:
                    await check_canary(self._engine, canary, stored.version)
                stored = replace(stored, served_at_s=time.time())
                await asyncio.to_thread(self._store.serve, stored)
            except RestartNeededError:
                raise
            except Exception as error:
                _log.error("weight version %s was not taken: %s", stored.version, error)
                await self._put_back(before)
                raise
            self.serving = Serving(stored.version, stored.digest)
            self.pause_s = time.monotonic() - begin
        return self.pause_s

    async def _put_back(self, retained: tuple[StoredWeights, ...]) -> None:
        """Loads the served version whole: the engine may hold a mix."""
        _log.info("putting weight version %s back", self.serving.version)
        try:
            await asyncio.to_thread(self._store.put_back, retained)
            if retained:
                await asyncio.to_thread(self._host.load, retained[-1])
            await self._engine.load(self._host.served(), self.serving.version)
        except RestartNeededError:
            raise
        except Exception as error:
            raise MixedWeightsError(f"the old weights could not be put back: {error}") from error

    def _target(self, version: int | None) -> StoredWeights:
        """What to roll back to. Raises PreconditionError."""
        retained = self._store.retained
        others = [stored for stored in retained if stored.digest != self.serving.digest]
        wanted = [stored for stored in others if version in (None, stored.version)]
        if not wanted:
            numbers = ", ".join(str(stored.version) for stored in others) or "none"
            which = "no version" if version is None else f"no other version {version}"
            raise PreconditionError(f"to_version: {which} is kept; those that differ: {numbers}")
        return wanted[-1]
