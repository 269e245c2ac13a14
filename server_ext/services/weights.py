"""WeightsService: pushed weight versions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from ibtree.errors import FieldError
from ibtree.v1 import weights_pb2 as pb
from ibtree.v1 import weights_pb2_grpc
from ibtree.weights import CHUNK_BYTES
from ibtree.wire_calls import manifest_from_proto, state_to_proto
from server_ext.services.errors import reported
from server_ext.weights.updater import WeightUpdater


class WeightsService(weights_pb2_grpc.WeightsServiceServicer):
    """See protos/ibtree/v1/weights.proto."""

    def __init__(self, updater: WeightUpdater) -> None:
        self._updater = updater

    async def PushWeights(
        self, requests: AsyncIterator[pb.PushWeightsRequest], context: Any
    ) -> pb.PushWeightsResponse:
        async with reported(context):
            first = await anext(aiter(requests), pb.PushWeightsRequest())
            if not first.HasField("manifest"):
                raise FieldError("manifest", "missing", "the stream's first message")
            manifest = manifest_from_proto(first.manifest)
            outcome = await self._updater.push(manifest, _chunks(requests))
            return pb.PushWeightsResponse(
                version=outcome.version,
                state=state_to_proto(outcome.state),
                digest=outcome.digest,
                pause_s=outcome.pause_s,
            )

    async def GetWeights(
        self, request: pb.GetWeightsRequest, context: Any
    ) -> pb.GetWeightsResponse:
        updater = self._updater
        return pb.GetWeightsResponse(
            version=updater.serving.version,
            digest=updater.serving.digest,
            state=state_to_proto(updater.state),
            model_id=updater.model_id,
            dtype=updater.dtype,
        )


async def _chunks(requests: AsyncIterator[pb.PushWeightsRequest]) -> AsyncIterator[bytes]:
    async for request in requests:
        if not request.HasField("chunk") or len(request.chunk) > CHUNK_BYTES:
            problem = f"{len(request.chunk)} bytes" if request.HasField("chunk") else "missing"
            raise FieldError("chunk", problem, f"at most {CHUNK_BYTES} bytes a message")
        yield request.chunk
