"""Checkpoints: written beside, made durable, renamed into place; the newest whole one counts.

out_dir/checkpoints/step-00000012/  model.safetensors  optimizer.pt  state.json
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ibtree.errors import PreconditionError


@dataclass
class TrainState:
    """What a run is besides weights and optimiser.

    `trained` is the ledger: ids of trees trained on or dropped whose ack is not confirmed yet.
    """

    step: int = 0
    version: int = 0
    version_digest: str = ""
    next_prompt: int = 0
    tokens: int = 0
    trained: list[str] = field(default_factory=list)
    torch_rng: list[int] = field(default_factory=list)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Named tensors of the model on the CPU, each storage once (tied weights under one name)."""
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    ties = bool(getattr(model.config, "tie_word_embeddings", False))
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in model.state_dict().items()
        if not (ties and name in tied)
    }


class Checkpoints:
    """The checkpoints of one run, the newest `keep` of them."""

    def __init__(self, directory: Path, keep: int) -> None:
        self._dir, self._keep = directory, keep
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob("*.part"):
            shutil.rmtree(leftover)

    def _steps(self) -> list[Path]:
        return sorted(self._dir.glob("step-*[0-9]"))

    def __bool__(self) -> bool:
        return bool(self._steps())

    def save(self, model: Any, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
        """Returns when the checkpoint is durable."""
        state.torch_rng = torch.get_rng_state().tolist()
        final = self._dir / f"step-{state.step:08d}"
        part = final.with_suffix(".part")
        part.mkdir()
        save_file(weights_of(model), part / "model.safetensors")
        torch.save(optimizer.state_dict(), part / "optimizer.pt")
        (part / "state.json").write_text(json.dumps(asdict(state)))
        for path in (*part.iterdir(), part):
            _sync(path)
        part.rename(final)
        _sync(self._dir)
        for old in self._steps()[: -self._keep]:
            shutil.rmtree(old)

    def load(self, model: Any, optimizer: torch.optim.Optimizer) -> TrainState | None:
        """Restores the newest checkpoint; None if there is none."""
        steps = self._steps()
        if not steps:
            return None
        newest = steps[-1]
        weights = load_file(newest / "model.safetensors")
        try:
            missing, unexpected = model.load_state_dict(weights, strict=False)
            fits = not unexpected and not set(missing) & set(weights_of(model))  # but tied names
        except RuntimeError:  # other shapes
            fits = False
        if not fits:
            raise PreconditionError(f"out_dir: {newest} is a checkpoint of another model")
        optimizer.load_state_dict(torch.load(newest / "optimizer.pt", weights_only=True))
        state = TrainState(**json.loads((newest / "state.json").read_text()))
        torch.set_rng_state(torch.tensor(state.torch_rng, dtype=torch.uint8))
        return state


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
