"""The weight switch's port on SGLang's tokenizer manager (pinned: 0.5.21)."""

from __future__ import annotations

import asyncio
from typing import Any

from server_ext.engine.switch import Bucket
from server_ext.errors import EngineError


class SglangWeights:
    """Implements server_ext.engine.switch.WeightPort."""

    def __init__(self, manager: Any, tp_size: int) -> None:
        """`manager`: SGLang's TokenizerManager."""
        self._manager, self._tp_size = manager, tp_size

    async def pause(self) -> None:
        """Running requests go back to the queue, with their tokens and without their KV."""
        from sglang.srt.managers.io_struct import PauseGenerationReqInput

        # of the other modes one aborts what runs, one keeps KV of the old weights
        await self._manager.pause_generation(PauseGenerationReqInput(mode="retract"))

    async def resume(self) -> None:
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput

        await self._manager.continue_generation(ContinueGenerationReqInput())

    async def begin(self) -> None:
        from sglang.srt.managers.io_struct import BeginWeightUpdateReqInput

        _check(await self._manager.begin_weight_update(BeginWeightUpdateReqInput(), None))

    async def load(self, bucket: Bucket, label: str) -> None:
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput

        request = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=await asyncio.to_thread(self._serialized, bucket),
            flush_cache=False,
            weight_version=label,
        )
        _check(await self._manager.update_weights_from_tensor(request, None))

    async def end(self) -> None:
        from sglang.srt.managers.io_struct import EndWeightUpdateReqInput

        _check(await self._manager.end_weight_update(EndWeightUpdateReqInput(), None))

    def _serialized(self, bucket: Bucket) -> list[bytes]:
        """One payload a tensor-parallel rank: each is consumed by the rank that reads it. The bytes
        are copied into shared memory once."""
        from sglang.srt.utils import MultiprocessingSerializer

        tensors = list(bucket)
        return [MultiprocessingSerializer.serialize(tensors) for _ in range(self._tp_size)]


def _check(result: tuple[bool, str]) -> None:
    success, message = result
    if not success:
        raise EngineError(f"weight update failed: {message}")
