"""The life of a pushed weight version.

announced ─▶ received ─▶ verified ─▶ staged ─▶ applied ─▶ serving
    │            │           │          │         │
    └────────────┴───────────┴──────────┴─────────┴──▶ rejected   (the old version serves on)
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from ibtree.errors import FieldError, PreconditionError
from ibtree.messages import PushOutcome
from ibtree.weights import DTYPE_BYTES, TensorSpec, WeightManifest, describe
from server_ext.engine import Engine, MixedWeightsError
from server_ext.weights.store import Serving, WeightStore

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)
_HEADER_BYTES_PER_TENSOR = 4096
_VERSIONS = 2**63  # trees carry them as 64-bit integers


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
    """Takes one push at a time."""

    def __init__(
        self,
        engine: Engine,
        store: WeightStore,
        model_dir: Path,
        specs: Mapping[str, TensorSpec],
        model_id: str,
    ) -> None:
        """`specs`: the model folder's tensors (names and shapes); the dtype is the engine's."""
        self._engine, self._store, self._model_dir = engine, store, model_dir
        self._specs, self.model_id = specs, model_id
        self._lock = asyncio.Lock()
        self.serving = Serving()
        self.state = WeightState.SERVING
        self.broken = asyncio.Event()
        """Set when a mix of weights may be loaded: the process must end."""

    @property
    def dtype(self) -> str:
        """safetensors dtype that is taken."""
        return self._engine.dtype

    async def restore(self) -> None:
        """Serves the version that served before a restart. Raises FieldError if it is damaged."""
        kept = self._store.serving()
        if kept.version:
            path = self._store.path(kept.version)
            if not path.is_file():
                raise FieldError("data_dir", f"{path} is missing", "put it back, or start anew")
            specs = await asyncio.to_thread(describe, path)
            manifest = WeightManifest(kept.version, self.model_id, specs, path.stat().st_size)
            if manifest.digest != kept.digest:
                raise FieldError("data_dir", f"{path} is damaged", "put it back, or start anew")
            tensors = await asyncio.to_thread(self._tensors, kept.version)
            async with self._engine.paused():
                await self._engine.load(tensors, kept.version)
            self.serving = kept
            _log.info("serving weight version %s again", kept.version)

    async def push(self, manifest: WeightManifest, chunks: AsyncIterator[bytes]) -> PushOutcome:
        """Receives, checks and serves a version; returns when it serves.

        Raises PreconditionError (another model, not newer, tensors that do not fit), FieldError
        (bytes that do not match the manifest), EngineError (not applied).
        """
        await self._lock.acquire()
        try:
            if Serving(manifest.version, manifest.digest) == self.serving:
                self._lock.release()
                return PushOutcome(manifest.version, WeightState.SERVING, manifest.digest, 0.0)
            self._enter(WeightState.ANNOUNCED, manifest)
            self._check(manifest)
            await self._receive(manifest, chunks)
            self._enter(WeightState.RECEIVED, manifest)
        except BaseException:
            self._enter(WeightState.REJECTED, manifest)
            self._lock.release()
            raise
        # With all its bytes here the version goes its way to the end, whether the caller waits or
        # not: half a version must not stay in the engine, nor the next push meet this one's file.
        finishing = asyncio.ensure_future(self._finish(manifest))
        finishing.add_done_callback(lambda _: self._lock.release())
        pause_s = await asyncio.shield(finishing)
        return PushOutcome(manifest.version, WeightState.SERVING, manifest.digest, pause_s)

    async def _finish(self, manifest: WeightManifest) -> float:
        """From received to serving, or rejected; returns the pause [s]."""
        try:
            await asyncio.to_thread(_verify, self._store.staging, manifest)
            self._enter(WeightState.VERIFIED, manifest)
            await asyncio.to_thread(self._store.keep, manifest.version)
            self._enter(WeightState.STAGED, manifest)
            pause_s = await self._apply(manifest)
        except BaseException:
            self._enter(WeightState.REJECTED, manifest)
            raise
        self._enter(WeightState.SERVING, manifest)
        return pause_s

    def _enter(self, state: WeightState, manifest: WeightManifest) -> None:
        """The one place where a version changes its state."""
        _log.info("weight version %s: %s", manifest.version, state)
        self.state = state

    def _check(self, manifest: WeightManifest) -> None:
        """Raises PreconditionError unless the announced tensors are exactly the model's."""
        if manifest.model_id != self.model_id:
            raise PreconditionError(
                f"model_id: the weights are of model {manifest.model_id[:12]}…, this server runs "
                f"{self.model_id[:12]}…; start the learner from the same model folder"
            )
        if manifest.base_version is not None:
            raise PreconditionError("base_version: deltas are not taken; push a whole version")
        if manifest.version >= _VERSIONS:
            problem = f"got {manifest.version}"
            raise FieldError(
                "manifest.version", problem, f"above the served one, below {_VERSIONS}"
            )
        if manifest.version <= self.serving.version:
            raise PreconditionError(
                f"version: {manifest.version} is not newer than the served {self.serving.version}"
            )
        names = [t.name for t in manifest.tensors]
        for name in (
            *sorted(set(names) - set(self._specs)),
            *sorted(set(self._specs) - set(names)),
        ):
            known = "is missing" if name in self._specs else "is not in the model"
            raise PreconditionError(f"tensors: {name!r} {known}; push exactly the model's tensors")
        if len(set(names)) != len(names):
            raise PreconditionError("tensors: a name stands twice; push each tensor once")
        for t in manifest.tensors:
            if t.shape != self._specs[t.name].shape:
                expected = list(self._specs[t.name].shape)
                raise PreconditionError(
                    f"tensors: {t.name!r} has shape {list(t.shape)}, the model {expected}"
                )
            if t.dtype != self.dtype:
                raise PreconditionError(
                    f"tensors: {t.name!r} has dtype {t.dtype}, the server takes {self.dtype}"
                )

    async def _receive(self, manifest: WeightManifest, chunks: AsyncIterator[bytes]) -> None:
        limit = manifest.file_bytes
        data_bytes = sum(DTYPE_BYTES[t.dtype] * math.prod(t.shape) for t in manifest.tensors)
        most = data_bytes + _HEADER_BYTES_PER_TENSOR * (len(manifest.tensors) + 1)
        if not data_bytes < limit <= most:
            raise FieldError("manifest.file_bytes", f"got {limit}", f"({data_bytes}, {most}]")
        received = 0
        with self._store.staging.open("wb") as file:
            async for chunk in chunks:
                received += len(chunk)
                if received > limit:
                    raise FieldError("chunk", f"more than {limit} bytes", "the announced size")
                file.write(chunk)  # 2 MiB into the page cache; a thread could outlive the push
        if received != limit:
            raise FieldError("chunk", f"the stream ended after {received} bytes", f"{limit}")

    async def _apply(self, manifest: WeightManifest) -> float:
        """No rollout runs from the first tensor until the version serves or the old one is back."""
        serving = Serving(manifest.version, manifest.digest)
        tensors = await asyncio.to_thread(self._tensors, manifest.version)
        async with self._engine.paused():
            begin = time.monotonic()
            try:
                await self._engine.load(tensors, manifest.version)
                self._enter(WeightState.APPLIED, manifest)
                await asyncio.to_thread(self._store.serve, serving)
            except Exception:
                await self._put_back()
                raise
            self.serving = serving
            return time.monotonic() - begin

    async def _put_back(self) -> None:
        _log.exception("an update failed half-way; putting version %s back", self.serving.version)
        try:
            tensors = await asyncio.to_thread(self._tensors, self.serving.version)
            await self._engine.load(tensors, self.serving.version)
            if self._store.serving() != self.serving:
                await asyncio.to_thread(self._store.serve, self.serving)
        except Exception as error:
            self.broken.set()
            raise MixedWeightsError("the old weights could not be put back") from error

    def _tensors(self, version: int) -> list[tuple[str, torch.Tensor]]:
        from safetensors.torch import load_file  # imports torch: not before it is needed

        files = [self._store.path(version)] if version else self._model_dir.glob("*.safetensors")
        return [item for path in sorted(files) for item in load_file(path).items()]


def _verify(path: Path, manifest: WeightManifest) -> None:
    """Raises FieldError unless the file holds exactly the announced tensors."""
    found = {t.name: t for t in describe(path)}
    for announced in manifest.tensors:
        tensor = found.pop(announced.name, None)
        if tensor is None:
            raise FieldError("weights", f"{announced.name} is not in the file", "as announced")
        if tensor != announced:
            what = "digest" if tensor.sha256 != announced.sha256 else "dtype or shape"
            raise FieldError("weights", f"wrong {what} of {announced.name}", "as announced")
    for name in found:
        raise FieldError("weights", f"the file holds {name}, not announced", "as announced")
