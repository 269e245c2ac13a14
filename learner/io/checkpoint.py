"""Checkpoints: written beside, made durable, renamed into place; the newest whole one counts.

out_dir/checkpoints/step-00000012/
    .metadata  __<rank>_0.distcp    weights, optimiser, generators (torch.distributed.checkpoint)
    state.json                      what the run is besides
    digests.json                    SHA-256 of each of these files

Rank 0 does all of it but for the ranks' parts, so `out_dir` is on a disk that all of them share.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ibtree.errors import PreconditionError
from learner.dist.process_group import ALONE, Ranks
from learner.dist.state import matches_model, read_shards, write_shards
from learner.errors import WriteError, writing

_log = logging.getLogger(__name__)
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


class Checkpoints:
    """The checkpoints of one run, the newest `keep` of them."""

    def __init__(self, directory: Path, keep: int, ranks: Ranks = ALONE) -> None:
        self._dir, self._keep, self._ranks = directory, keep, ranks
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
                write_shards(part, model, optimizer, self._ranks)
                _seal(part, state)
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
        return self._read(steps[-1], model, optimizer) if steps else None

    def _read(self, folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> TrainState:
        if not matches_model(folder, model):
            raise PreconditionError(f"out_dir: {folder} is a checkpoint of another model")
        read_shards(folder, model, optimizer, self._ranks)
        return TrainState(**json.loads((folder / "state.json").read_text()))


def _seal(folder: Path, state: TrainState) -> None:
    """Adds what the ranks do not write, and makes all of it durable."""
    (folder / "state.json").write_text(json.dumps(asdict(state)))
    digests = {path.name: _digest(path) for path in folder.iterdir()}
    (folder / _DIGESTS).write_text(json.dumps(digests))
    for path in (*folder.iterdir(), folder):
        sync(path)


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
