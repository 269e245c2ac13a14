"""Checkpoints: written beside, made durable, renamed into place; the newest whole one counts.

out_dir/checkpoints/step-00000012/
    .metadata  __0_0.distcp    weights, optimiser, generators (torch.distributed.checkpoint)
    state.json                 what the run is besides
    digests.json               SHA-256 of each of these files
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ibtree.errors import PreconditionError
from learner.errors import WriteError, writing

_log = logging.getLogger(__name__)
_OPTIONS = sharded.StateDictOptions(strict=False, flatten_optimizer_state_dict=True)
_DIGESTS = "digests.json"


@dataclass
class TrainState:
    """What a run is besides weights, optimiser and generators.

    Prompts below `prompts_done` are done with: their trees were trained on, dropped, or never
    came. `trained` is the ledger: ids of such trees whose ack is not confirmed yet. `leases` are
    those in hand, with the tree of each. `updates` counts optimiser steps, `bad_steps` the last
    steps in a row that were skipped; `figures` are those reported of step `step`.
    """

    step: int = 0
    version: int = 0
    version_digest: str = ""
    updates: int = 0
    bad_steps: int = 0
    prompts_done: int = 0
    next_prompt: int = 0
    tokens: int = 0
    trained: list[str] = field(default_factory=list)
    leases: dict[str, str] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Named tensors of the model on the CPU, each storage once (tied weights under one name)."""
    whole = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = _untied(model, sharded.get_model_state_dict(model, options=whole))
    return {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}


def _untied(model: Any, weights: dict[str, Any]) -> dict[str, Any]:
    ties = bool(getattr(model.config, "tie_word_embeddings", False))
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if ties else set()
    return {name: tensor for name, tensor in weights.items() if name not in tied}


class Checkpoints:
    """The checkpoints of one run, the newest `keep` of them."""

    def __init__(self, directory: Path, keep: int) -> None:
        self._dir, self._keep = directory, keep
        with writing("checkpoints", directory):
            directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob("*.part"):
            shutil.rmtree(leftover)

    def _steps(self) -> list[Path]:
        return sorted(self._dir.glob("step-*[0-9]"))

    def newest(self) -> int:
        """Step of the newest checkpoint; 0 without any."""
        return max((int(path.name.removeprefix("step-")) for path in self._steps()), default=0)

    def save(self, model: Any, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
        """Returns when the checkpoint is durable. Raises WriteError; the one before then stays."""
        final = self._dir / f"step-{state.step:08d}"
        part = final.with_suffix(".part")
        try:
            with writing(f"the checkpoint of step {state.step}", self._dir):
                part.mkdir()
                _write(part, model, optimizer, state)
                part.rename(final)
                sync(self._dir)
        except WriteError:
            shutil.rmtree(part, ignore_errors=True)
            raise
        for old in self._steps()[: -self._keep]:
            shutil.rmtree(old)

    def load(self, model: Any, optimizer: torch.optim.Optimizer) -> TrainState | None:
        """Restores the newest whole checkpoint; None if there never was one.

        Damaged ones are kept aside with a warning. Raises PreconditionError if none is whole, or
        if it is of another model; nothing is changed then.
        """
        steps = self._steps()
        damage: dict[Path, str] = {}
        while steps and (problem := _damage(steps[-1])):
            damage[steps.pop()] = problem
        if damage and not steps:
            raise PreconditionError(
                f"out_dir: no checkpoint in {self._dir} is whole ({'; '.join(damage.values())}); "
                "put one back, or give an out_dir of its own to start anew"
            )
        for path, problem in damage.items():
            _log.warning("%s; kept aside, going on from %s", problem, steps[-1].name)
            path.rename(_free_name(path))
        return _read(steps[-1], model, optimizer) if steps else None


def _parts(model: Any, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """What torch.distributed.checkpoint writes, and reads into."""
    weights = sharded.get_model_state_dict(model, options=_OPTIONS)
    parts = {"model": _untied(model, weights), "rng": {"cpu": torch.get_rng_state()}}
    if torch.cuda.is_available():
        parts["rng"]["cuda"] = torch.cuda.get_rng_state()
    if optimizer is not None:
        parts["optimizer"] = sharded.get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
    return parts


def _write(folder: Path, model: Any, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
    # asked for its state before its first step, torch would have it take an empty one
    parts = _parts(model, optimizer if optimizer.state else None)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
            save(parts, checkpoint_id=folder)
    except CheckpointException as error:  # a BaseException around whatever was raised
        failure = next(iter(error.failures.values()))[0]
        raise OSError(str(failure)) if isinstance(failure, Exception) else failure from error
    (folder / "state.json").write_text(json.dumps(asdict(state)))
    digests = {path.name: _digest(path) for path in folder.iterdir()}
    (folder / _DIGESTS).write_text(json.dumps(digests))
    for path in (*folder.iterdir(), folder):
        sync(path)


def _read(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> TrainState:
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    sizes = {
        name.removeprefix("model."): entry.size
        for name, entry in stored.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    weights = _untied(model, sharded.get_model_state_dict(model, options=_OPTIONS))
    if sizes != {name: tensor.shape for name, tensor in weights.items()}:
        raise PreconditionError(f"out_dir: {folder} is a checkpoint of another model")
    stepped = any(name.startswith("optimizer.") for name in stored)
    parts = _parts(model, optimizer if stepped else None)
    parts["rng"] = {name: rng for name, rng in parts["rng"].items() if f"rng.{name}" in stored}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        load(parts, checkpoint_id=folder)
    sharded.set_model_state_dict(model, parts["model"], options=_OPTIONS)
    optimizer.state.clear()
    if stepped:
        sharded.set_optimizer_state_dict(model, optimizer, parts["optimizer"], options=_OPTIONS)
    torch.set_rng_state(parts["rng"]["cpu"])
    if "cuda" in parts["rng"]:
        torch.cuda.set_rng_state(parts["rng"]["cuda"])
    return TrainState(**json.loads((folder / "state.json").read_text()))


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files; empty if they are whole."""
    try:
        digests = json.loads((folder / _DIGESTS).read_text())
        for name, digest in digests.items():
            if _digest(folder / name) != digest:
                return f"{folder / name} is damaged"
    except (OSError, ValueError, AttributeError) as error:
        return f"{folder} is damaged ({error})"
    return ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.damaged{n or ''}") for n in range(10**6))
    return next(name for name in names if not name.exists())


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's entries, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
