"""What SGLang's schedulers do with a weight update: SGLang's plugin of the switch.

An exception in the model's own loader would end the scheduler, and SGLang then ends the server.
Here it becomes the answer to the call: the server puts the old version back, or says that it has to
be restarted (switch.py). All tensor-parallel ranks give the same answer, since the first one's is
the only one that is heard, and their sessions are open or closed alike, since the next call waits
for all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

_log = logging.getLogger(__name__)
_MANAGER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_UNWRAP = "sglang.srt.model_executor.model_runner_components.weight_updater._unwrap_tensor"
_UPDATE = "update_weights_from_tensor"
_ANSWERS = {
    "begin_weight_update": "BeginWeightUpdateReqOutput",
    _UPDATE: "UpdateWeightsFromTensorReqOutput",
    "end_weight_update": "EndWeightUpdateReqOutput",
}
"""Methods of SGLang's manager of updates, and their answers in its io_struct."""


def register() -> None:
    """Registers the hooks."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for method in _ANSWERS:
        HookRegistry.register(f"{_MANAGER}.{method}", answering(method), HookType.AROUND)
    HookRegistry.register(_UNWRAP, kept_on_the_host, HookType.REPLACE)


def answering(method: str) -> Callable[[Any, Any, Any], Any]:
    """A hook around a method of the manager: what is raised on any rank is every rank's answer."""

    def hook(original: Callable[[Any, Any], Any], manager: Any, request: Any) -> Any:
        raised = refused = ""
        answer = None
        try:
            answer = original(manager, request)
            refused = "" if answer.success else answer.message
        except Exception as error:
            _log.exception("%s failed", method)
            raised = f"{type(error).__name__}: {error}"
            _barrier(manager)  # where the ranks wait on which nothing was raised
        outcomes = _of_all_ranks(manager, (raised, refused))
        problems = list(dict.fromkeys(text for outcome in outcomes for text in outcome if text))
        if answer is not None and not problems:
            return answer
        if method == _UPDATE:
            if (raised or refused) and manager._session is not None:
                # its weights changed as well, in part, and caches name theirs by it
                manager.record_weight_version_after_update(request.weight_version)
        elif any(raised for raised, _ in outcomes):
            manager._session = None  # it did not begin, or it is over
        from sglang.srt.managers import io_struct

        return getattr(io_struct, _ANSWERS[method])(success=False, message=" | ".join(problems))

    return hook


def kept_on_the_host(tensor: Any, tp_rank: int, device: Any) -> Any:
    """In the place of `_unwrap_tensor`, which moves whole tensors to the GPU before the model's
    loader copies its part of each: a large embedding has no room there beside the KV cache. The
    loader takes them from the host, as when the model was loaded first."""
    from sglang.srt.model_executor.model_runner_components.weight_updater import (
        LocalSerializedTensor,
    )

    if isinstance(tensor, LocalSerializedTensor):
        tensor = tensor.get(tp_rank)
    return tensor if tensor.device.type == "cpu" else tensor.to(device)


def _barrier(manager: Any) -> None:
    import torch

    torch.distributed.barrier(group=manager.tp_cpu_group)


def _of_all_ranks(manager: Any, own: tuple[str, str]) -> list[tuple[str, str]]:
    import torch

    ranks = torch.distributed.get_world_size(manager.tp_cpu_group)
    if ranks == 1:
        return [own]
    outcomes: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(outcomes, own, group=manager.tp_cpu_group)
    return outcomes
