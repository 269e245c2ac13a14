"""Weight versions of a run: pushed, held half-way, cut off, rolled back, and looked at."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import grpc
import grpc.aio
import torch
from safetensors.torch import load_file, save_file

from ibtree.client.channel import CHANNEL_OPTIONS
from ibtree.messages import PushOutcome
from ibtree.weights.manifest import WeightManifest
from ibtree.weights.tensor_files import make_manifest
from ibtree.wire import calls, messages
from ibtree.wire.v1 import weights_pb2
from tests.fault.soak.events import EventLog, Kind, now_s

PUSH_S = 60.0
"""Deadline of a push or rollback."""
_REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
}
"""Statuses that say that nothing was taken (protos/ibtree/v1/weights.proto)."""


class Update:
    """A push or a rollback under way."""

    def __init__(self, call: Any, work: asyncio.Task[None], go_on: asyncio.Event) -> None:
        self._call, self._work, self._go_on = call, work, go_on

    @property
    def done(self) -> bool:
        return self._work.done()

    def cut(self) -> None:
        """The caller is gone."""
        self._call.cancel()

    async def finish(self) -> None:
        """Lets it go on, and returns when it is over, whatever became of it."""
        self._go_on.set()
        await self._work


class Publisher:
    """Pushes and rolls back through `address`, and writes down what was sent and answered."""

    def __init__(
        self, address: str, model_id: str, model_file: Path, log: EventLog, seed: int
    ) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._model_id, self._log = model_id, log
        self._noise = torch.Generator().manual_seed(seed)
        self._model = {name: tensor.float() for name, tensor in load_file(model_file).items()}

    async def close(self) -> None:
        await self._channel.close(None)

    def served(self, version: int, digest: bytes, asked_s: float) -> None:
        """The server said that it serves this."""
        self._log.write(Kind.SERVED, version=version, digest=digest.hex(), asked_s=asked_s)

    def push(self, version: int, *, held: bool = False, damaged: bool = False) -> Update:
        """Begins to push new weights as this version. `held`: half of the file waits until
        `finish`; `damaged`: a byte is not what the manifest says."""
        manifest, data = self._new_weights(version)
        if damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        go_on, start = asyncio.Event(), asyncio.Queue[int]()
        if not held:
            go_on.set()
        method = calls.PUSH_WEIGHTS.on(self._channel.stream_stream)
        self._log.write(Kind.SENT, version=version, digest=manifest.digest.hex())
        call = method(_requests(manifest, data, start, go_on), timeout=PUSH_S)
        work = asyncio.create_task(self._pushed(call, manifest, start))
        return Update(call, work, go_on)

    def roll_back(self) -> Update:
        """Begins to go back to the newest other version."""
        self._log.write(Kind.ROLLBACK)
        request = calls.rollback_weights(None)
        call = request.method.on(self._channel.unary_unary)(request.request, timeout=PUSH_S)

        async def work() -> None:
            asked_s = now_s()
            with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
                outcome = request.decode(await call)
                self.served(outcome.version, outcome.digest, asked_s)

        return Update(call, asyncio.create_task(work()), asyncio.Event())

    async def _pushed(self, call: Any, manifest: WeightManifest, start: asyncio.Queue[int]) -> None:
        asked_s = now_s()
        try:
            async for message in call:
                answer = messages.push_answer(message)
                if isinstance(answer, PushOutcome):
                    self.served(answer.version, answer.digest, asked_s)
                else:
                    start.put_nowait(answer)
        except grpc.aio.AioRpcError as error:
            if error.code() in _REFUSALS:
                facts = {"version": manifest.version, "digest": manifest.digest.hex()}
                self._log.write(Kind.REFUSED, **facts, code=error.code().name)
        except asyncio.CancelledError:
            if not call.cancelled():
                raise

    def _new_weights(self, version: int) -> tuple[WeightManifest, bytes]:
        """The model with one vector moved a little, as this version."""
        name = next(n for n, tensor in sorted(self._model.items()) if tensor.ndim == 1)
        before = self._model[name]
        moved = before * (1 + 1e-3 * torch.randn(before.shape, generator=self._noise))
        with NamedTemporaryFile(suffix=".safetensors") as file:
            path = Path(file.name)
            save_file({**self._model, name: moved}, path)
            return make_manifest(path, version, self._model_id), path.read_bytes()


async def _requests(
    manifest: WeightManifest, data: bytes, start: asyncio.Queue[int], go_on: asyncio.Event
) -> AsyncIterator[weights_pb2.PushWeightsRequest]:
    yield messages.push_first(manifest)
    at = await start.get()
    half = max(len(data) // 2, at)
    for low, high in ((at, half), (half, len(data))):
        if high > low:
            part = data[low:high]
            chunk = weights_pb2.WeightChunk(offset=low, data=part, crc32=zlib.crc32(part))
            yield weights_pb2.PushWeightsRequest(chunk=chunk)
        await go_on.wait()
