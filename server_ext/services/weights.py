"""WeightsService: pushed weight versions."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ibtree.errors import FieldError
from ibtree.weights.manifest import CHUNK_BYTES
from ibtree.wire.messages import kept_to_proto, manifest_from_proto, pushed_to_proto, state_to_proto
from ibtree.wire.v1 import weights_pb2 as pb
from ibtree.wire.v1 import weights_pb2_grpc
from server_ext.errors import BrokenPushError
from server_ext.services.statuses import reported
from server_ext.weights.shared_folder import SharedFolder
from server_ext.weights.updater import WeightUpdater


class WeightsService(weights_pb2_grpc.WeightsServiceServicer):
    """See protos/ibtree/v1/weights.proto."""

    def __init__(self, updater: WeightUpdater, shared_dir: Path | None = None) -> None:
        """`shared_dir`: where pushed files may lie instead of being sent; None: nowhere."""
        self._updater, self._shared_folder = updater, SharedFolder(shared_dir)

    def add_to(self, server: Any) -> None:
        weights_pb2_grpc.add_WeightsServiceServicer_to_server(self, server)

    async def PushWeights(  # type: ignore[override]  # writes its answers while it reads
        self, requests: AsyncIterator[pb.PushWeightsRequest], context: Any
    ) -> None:
        async with reported(context):
            first = await self._first(requests)
            if not first.HasField("manifest"):
                raise FieldError("manifest", "missing", "the stream's first message")
            manifest = await asyncio.to_thread(manifest_from_proto, first.manifest)
            if first.shared_path:
                source = self._shared_folder.source(first.shared_path)
            else:
                source = _Stream(requests, context).chunks
            outcome = await self._updater.push(manifest, source)
            await context.write(pushed_to_proto(outcome))

    async def _first(self, requests: AsyncIterator[pb.PushWeightsRequest]) -> Any:
        idle_timeout_s = self._updater.push_idle_timeout_s
        try:
            async with asyncio.timeout(idle_timeout_s):
                return await anext(aiter(requests), pb.PushWeightsRequest())
        except TimeoutError as error:
            problem = f"no manifest came within {idle_timeout_s:g} s"
            raise BrokenPushError(f"{problem}; push again") from error

    async def GetWeights(
        self, request: pb.GetWeightsRequest, context: Any
    ) -> pb.GetWeightsResponse:
        updater = self._updater
        retained = updater.retained
        return pb.GetWeightsResponse(
            version=updater.serving.version,
            digest=updater.serving.digest,
            state=state_to_proto(updater.state),
            model_id=updater.model_id,
            dtype=updater.dtype,
            age_s=max(time.time() - retained[-1].served_at_s, 0.0) if retained else 0.0,
            pause_s=updater.pause_s,
            kept=[kept_to_proto(stored) for stored in retained],
        )

    async def RollbackWeights(
        self, request: pb.RollbackWeightsRequest, context: Any
    ) -> pb.RollbackWeightsResponse:
        async with reported(context):
            to_version = request.to_version if request.HasField("to_version") else None
            outcome = await self._updater.rollback(to_version)
            return pb.RollbackWeightsResponse(
                version=outcome.version,
                restored_version=outcome.restored_version,
                digest=outcome.digest,
                pause_s=outcome.pause_s,
            )

    async def AbortPushes(
        self, request: pb.AbortPushesRequest, context: Any
    ) -> pb.AbortPushesResponse:
        version = request.version if request.HasField("version") else None
        return pb.AbortPushesResponse(versions=self._updater.abort(version))


class _Stream:
    """The chunks of one call."""

    def __init__(self, requests: AsyncIterator[pb.PushWeightsRequest], context: Any) -> None:
        self._requests, self._context = requests, context

    async def chunks(self, start: int) -> AsyncIterator[bytes]:
        await self._context.write(pb.PushWeightsResponse(send_from=start))
        at = start
        async for request in self._requests:
            chunk = request.chunk
            data = chunk.data  # a copy, each time it is asked for
            if not request.HasField("chunk") or not 0 < len(data) <= CHUNK_BYTES:
                problem = f"{len(data)} bytes" if request.HasField("chunk") else "missing"
                raise FieldError("chunk", problem, f"1 to {CHUNK_BYTES} bytes a message")
            if chunk.offset != at:
                raise FieldError("chunk.offset", f"got {chunk.offset}", f"{at}: in order")
            if zlib.crc32(data) != chunk.crc32:
                raise BrokenPushError(f"the chunk at byte {at} was damaged on its way; push again")
            yield data
            at += len(data)
