"""SGLang's side of the real SglangEngine, in this process: its own manager of weight updates and
its own updater, with our hooks, over a toy model. In the place of its tokenizer manager, which only
passes messages on, stands one that passes them on here.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from server_ext.engine.sglang import SglangEngine
from tests.server_ext.versions import Served, Tensors, same_tensors

Fault = Callable[[], None]


class ToyModel(torch.nn.Module):
    """Parameters by name. `faults`: what is raised at each of the next tensors; None: nothing."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.values = {name: tensor.clone() for name, tensor in tensors.items()}
        self.faults: deque[Exception | None] = deque()
        self.largest_load = 0
        """Most bytes that one call has brought."""

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.largest_load = max(self.largest_load, sum(tensor.nbytes for _, tensor in weights))
        for name, tensor in weights:
            fault = self.faults.popleft() if self.faults else None
            if fault:
                raise fault
            self.values[name].copy_(tensor)


class TokenizerManager:
    """Has the methods of SGLang's that SglangEngine calls. `before` and `after` map a method to
    what happens, once, before it reaches the scheduler or when it has."""

    def __init__(self, model: ToyModel) -> None:
        from sglang.srt.managers.scheduler_components import weight_updater as managers
        from sglang.srt.model_executor.model_runner_components import weight_updater as updaters
        from sglang.srt.utils import MultiprocessingSerializer
        from sglang.utils import TypeBasedDispatcher

        self.model = model
        self.model_config = SimpleNamespace(context_len=512, dtype="torch.float32")
        self._result_dispatcher = TypeBasedDispatcher([])
        self.rid_to_state: dict[str, Any] = {}
        self.label, self.paused, self.calls = "0", False, list[str]()
        self.before: dict[str, deque[Fault | None]] = {}
        self.after: dict[str, deque[Fault | None]] = {}
        updater = updaters.WeightUpdater(
            tp_rank=0,
            device="cpu",
            gpu_id=0,
            model_config=self.model_config,
            custom_weight_loaders={},
            get_model=lambda: model,
            update_model_fields=lambda *_, **__: None,
            recapture_cuda_graph=lambda: None,
            get_model_runner=lambda: None,
        )
        runner = SimpleNamespace(weight_updater=updater)
        worker = SimpleNamespace(
            model_runner=runner,
            deserialize_own_rank=lambda parts: MultiprocessingSerializer.deserialize(parts[0]),
            weight_update_runners=lambda: [("target", runner)],
        )
        self.scheduler = managers.SchedulerWeightUpdaterManager(
            tp_worker=worker,
            draft_worker=None,
            tp_cpu_group=torch.distributed.group.WORLD,
            memory_saver_adapter=None,
            flush_cache=lambda **_: True,
            is_fully_idle=lambda **_: True,
            scheduler=SimpleNamespace(record_weight_version_change=self._labelled),
        )

    def _labelled(self, new_version: str) -> None:
        self.label = new_version

    async def _passed_on(self, method: str, request: Any) -> tuple[bool, str]:
        self.calls.append(method)
        await asyncio.sleep(0)
        _next(self.before, method)
        answer = getattr(self.scheduler, method)(request)
        _next(self.after, method)
        return answer.success, answer.message

    async def begin_weight_update(self, request: Any, _: None) -> tuple[bool, str]:
        return await self._passed_on("begin_weight_update", request)

    async def update_weights_from_tensor(self, request: Any, _: None) -> tuple[bool, str]:
        return await self._passed_on("update_weights_from_tensor", request)

    async def end_weight_update(self, request: Any, _: None) -> tuple[bool, str]:
        return await self._passed_on("end_weight_update", request)

    async def pause_generation(self, request: Any) -> None:
        assert request.mode == "retract"
        self.paused = True
        _next(self.after, "pause_generation")

    async def continue_generation(self, _: Any) -> None:
        _next(self.before, "continue_generation")
        self.paused = False

    @property
    def open(self) -> bool:
        """Whether a weight-update session is open."""
        return self.scheduler._session is not None


def _next(faults: dict[str, deque[Fault | None]], method: str) -> None:
    fault = faults[method].popleft() if faults.get(method) else None
    if fault:
        fault()


class SglangServed(Served):
    """A server's weights on disk, under the real SglangEngine."""

    model: ToyModel
    manager: TokenizerManager

    def new_engine(self, tensors: Tensors) -> Any:
        self.model = ToyModel(tensors)
        self.manager = manager = TokenizerManager(self.model)
        sglang = SimpleNamespace(tokenizer_manager=manager, shutdown=lambda: None)
        values = {"dp_size": 1, "tp_size": 1, "enable_deterministic_inference": False}
        arguments = SimpleNamespace(resolved_dict=lambda: values)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("sglang.Engine", lambda server_args: sglang)
            patched.setattr("server_ext.engine.sglang.server_arguments", lambda *_: arguments)
            return SglangEngine("model", "cpu", "float32", 5.0, [], self.switch)

    def check(self, number: int, expected: Any = None) -> None:
        same_tensors(self.model.values, number, expected)
        assert self.updater.serving.version == number
        assert self.manager.label.partition(".")[0] == str(number)
        assert self.engine._switch.state == "running"
        assert not self.updater.broken.is_set()
        assert not self.manager.open and not self.manager.paused
