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
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from ibtree.errors import PreconditionError
from ibtree.messages import PushOutcome, RollbackOutcome
from ibtree.weights.manifest import Canary, TensorSpec, WeightManifest
from server_ext.engine.port import Engine
from server_ext.errors import MixedWeightsError
from server_ext.weights.canary import check_canary, check_sizes
from server_ext.weights.host_copy import HostCopy
from server_ext.weights.inbox import Inbox, Source
from server_ext.weights.manifest import check_size, check_tensors, check_version
from server_ext.weights.store import Serving, StoredWeights, WeightStore

_log = logging.getLogger(__name__)
_PUT_BACK_S = 600.0
"""An engine that takes longer does not answer any more: the process ends and starts anew."""


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
    """Takes one push or rollback at a time."""

    def __init__(
        self,
        engine: Engine,
        store: WeightStore,
        model_dir: Path,
        specs: Mapping[str, TensorSpec],
        model_id: str,
    ) -> None:
        """`specs`: the model folder's tensors (names and shapes); the dtype is the engine's."""
        self._engine, self._store = engine, store
        self._specs, self.model_id = specs, model_id
        self._lock = asyncio.Lock()
        self._tidying: asyncio.Future[None] | None = None
        self._inbox = Inbox(store.staging, store.spare)
        self._host = HostCopy(store, model_dir)
        self.serving = Serving()
        self.state = WeightState.SERVING
        self.pause_s = 0.0
        """How long no rollout could run at the last update."""
        self.broken = asyncio.Event()
        """Set when a mix of weights may be loaded: the process must end."""

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
        """Receives, checks and serves a version; returns when it serves.

        Raises PreconditionError (another model or base, not newer, tensors that do not fit, a
        canary that fails), FieldError (bytes that do not match the manifest), EngineError (not
        applied), and what the source raises.
        """
        await self._lock.acquire()
        version = manifest.version
        try:
            if Serving(version, manifest.digest) == self.serving:
                self._lock.release()
                return PushOutcome(version, WeightState.SERVING, manifest.digest, 0.0)
            self._enter(WeightState.ANNOUNCED, version)
            self._check(manifest)
            await self._inbox.receive(manifest, source)
            self._enter(WeightState.RECEIVED, version)
        except BaseException:
            self._enter(WeightState.REJECTED, version)
            self._lock.release()
            raise
        pause_s = await self._to_the_end(version, self._take(manifest))
        return PushOutcome(version, WeightState.SERVING, manifest.digest, pause_s)

    async def rollback(self, to_version: int | None = None) -> RollbackOutcome:
        """Serves a kept version's tensors again, as the version after the served one; by default
        those of the newest that differs. Raises PreconditionError, FieldError, EngineError."""
        await self._lock.acquire()
        try:
            target = self._target(to_version)
        except BaseException:
            self._lock.release()
            raise
        version = self.serving.version + 1
        self._enter(WeightState.ANNOUNCED, version)
        pause_s = await self._to_the_end(version, self._go_back(target, version))
        return RollbackOutcome(version, target.version, target.digest, pause_s)

    async def _to_the_end(self, version: int, work: Coroutine[Any, Any, float]) -> float:
        """Lets the version go its way, whether the caller waits or not: half a version must not
        stay in the engine, nor the next push meet this one's file."""

        async def whole() -> float:
            try:
                pause_s = await work
            except BaseException:
                self._enter(WeightState.REJECTED, version)
                raise
            self._enter(WeightState.SERVING, version)
            return pause_s

        async def tidied() -> None:
            try:
                await asyncio.wait({finishing})
                if not (finishing.cancelled() or self.broken.is_set()):
                    await asyncio.to_thread(self._store.drop)  # large files take their time
            finally:
                self._lock.release()

        finishing = asyncio.ensure_future(whole())
        self._tidying = asyncio.ensure_future(tidied())
        return await asyncio.shield(finishing)

    async def _take(self, manifest: WeightManifest) -> float:
        """Takes a version from received to applied; returns the pause [s]."""
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
        finally:
            self._inbox.forget()

    async def _go_back(self, target: StoredWeights, version: int) -> float:
        """Takes a rollback from announced to applied; returns the pause [s]."""
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

    def _enter(self, state: WeightState, version: int) -> None:
        """The one statement that changes a version's state."""
        _log.info("weight version %s: %s", version, state)
        self.state = state

    def _check(self, manifest: WeightManifest) -> None:
        """Raises PreconditionError or FieldError unless it can follow the served version."""
        if manifest.model_id != self.model_id:
            raise PreconditionError(
                f"model_id: the weights are of model {manifest.model_id[:12]}…, this server runs "
                f"{self.model_id[:12]}…; start the learner from the same model folder"
            )
        check_version(manifest, self.serving)
        check_tensors(manifest, self._specs, self.dtype)
        if manifest.base_version is not None:
            base, ours = Serving(manifest.base_version, manifest.base_digest), self._host.version
            if not base.digest or not base == self.serving == ours:
                known = ours if ours and ours.digest else None
                has = f"version {known.version} ({known.digest.hex()[:12]}…)" if known else "none"
                raise PreconditionError(
                    f"base_version: the delta builds on version {base.version} "
                    f"({base.digest.hex()[:12]}…), this server holds {has}; push a whole version"
                )
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
        return StoredWeights(manifest.version, manifest.digest, size, 0.0, base, files=files)

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
            async with asyncio.timeout(_PUT_BACK_S):
                await self._engine.load(self._host.served(), self.serving.version)
        except Exception as error:
            self.broken.set()
            raise MixedWeightsError("the old weights could not be put back") from error

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
