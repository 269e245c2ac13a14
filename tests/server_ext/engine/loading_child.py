"""Run as a process: one of two ranks whose schedulers take weight updates.

    python -m tests.server_ext.engine.loading_child STORE_FILE RANK

Each line that it prints is its answer to one call: [success, message, whether a session is open,
how often its weights changed].
"""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch.distributed as dist

from server_ext.engine.loading import answering

ANSWERS = ("BeginWeightUpdate", "UpdateWeightsFromTensor", "EndWeightUpdate")


class Manager:
    """Calls like those of SGLang's: a barrier at the end of each that goes well."""

    def __init__(self, rank: int) -> None:
        self.rank, self.tp_cpu_group, self._session = rank, dist.group.WORLD, None
        self.changes = 0
        """How often its weights changed, as far as caches were told."""

    def begin_weight_update(self, request: Any) -> Any:
        if self._session is not None:
            return SimpleNamespace(success=False, message="already open")
        self._fail(request)
        self._session = "open"
        dist.barrier(group=self.tp_cpu_group)
        return SimpleNamespace(success=True, message="begun")

    def update_weights_from_tensor(self, request: Any) -> Any:
        self._fail(request)
        self.record_weight_version_after_update(request.weight_version)
        dist.barrier(group=self.tp_cpu_group)
        return SimpleNamespace(success=True, message="taken")

    def record_weight_version_after_update(self, _: str) -> None:
        self.changes += 1

    def end_weight_update(self, request: Any) -> Any:
        self._fail(request)
        self._session = None
        dist.barrier(group=self.tp_cpu_group)
        return SimpleNamespace(success=True, message="ended")

    def _fail(self, request: Any) -> None:
        if self.rank in request.failing:
            raise RuntimeError(f"rank {self.rank} failed")


CALLS = ("begin_weight_update", "update_weights_from_tensor", "end_weight_update")
FAILING = ((), (1,), (0,), (0, 1))
"""The ranks on which a call fails."""


def without_sglang() -> None:
    """Its answers alone: importing it takes longer than the rest, and test_switch.py has it."""
    names = ("sglang", "sglang.srt", "sglang.srt.managers", "sglang.srt.managers.io_struct")
    for name in names:
        sys.modules[name] = ModuleType(name)
    for answer in ANSWERS:
        setattr(sys.modules[names[-1]], f"{answer}ReqOutput", SimpleNamespace)
    sys.modules[names[-2]].io_struct = sys.modules[names[-1]]  # type: ignore[attr-defined]


def main(store: str, rank: int) -> None:
    without_sglang()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    manager = Manager(rank)

    def call(method: str, failing: tuple[int, ...] = ()) -> Any:
        request = SimpleNamespace(failing=failing, weight_version="1")
        return answering(method)(getattr(Manager, method), manager, request)

    for failing in FAILING:
        for method in CALLS:
            if method != "begin_weight_update" and manager._session is None:
                call("begin_weight_update")
            answer = call(method, failing)
            line = [answer.success, answer.message, manager._session is not None, manager.changes]
            print(json.dumps(line), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
