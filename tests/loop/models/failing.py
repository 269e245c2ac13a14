"""SGLang's Qwen2, whose loader fails half-way when a file says so."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from sglang.srt.models import qwen2

from tests.loop.models.names import FAILURES_VARIABLE


class Qwen2ForCausalLM(qwen2.Qwen2ForCausalLM):
    """Has the name that config.json asks for."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        planned = Path(os.environ[FAILURES_VARIABLE])
        loads = planned.read_text() if planned.exists() else ""
        planned.write_text(loads[1:])
        if not loads.startswith("x"):
            super().load_weights(weights)
            return
        some = list(weights)
        super().load_weights(some[: len(some) // 2])
        raise KeyError("no such parameter in this build")


EntryClass = Qwen2ForCausalLM
