"""The model and the optimiser written to files and read back, whichever ranks hold which parts.

All ranks call these functions at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from learner.dist.fsdp import whole
from learner.dist.process_group import Ranks

_OPTIONS = sharded.StateDictOptions(strict=False, flatten_optimizer_state_dict=True)


def weights_of(
    model: Any, ranks: Ranks, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Named tensors of the model on the CPU, each storage once (tied weights under one name), in
    `dtype` if there is one; none on ranks other than 0. A device holds one of them at a time."""
    weights = {}
    with ranks.together("weights"):
        parts = sharded.get_model_state_dict(model, options=_OPTIONS)
        for name, part in untied(model, parts).items():
            tensor = whole(part.detach())
            if ranks.leads:
                weights[name] = tensor.to("cpu", dtype or tensor.dtype, copy=True).contiguous()
    return weights


def write_shards(folder: Path, model: Any, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Writes weights, optimiser and each rank's generators. Raises OSError, on every rank, where
    one of them can not write."""
    with ranks.together("save", folder=str(folder)), _without_group():
        # asked for its state before its first step, torch would have it take an empty one
        parts = _parts(model, optimizer if optimizer.state else None, ranks)
        try:
            save(parts, checkpoint_id=folder)
        except CheckpointException as error:  # a BaseException around whatever was raised
            failure = next(iter(error.failures.values()))[0]
            raise OSError(str(failure)) if isinstance(failure, Exception) else failure from error


def read_shards(folder: Path, model: Any, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Reads what write_shards wrote, on any number of ranks; generators of ranks that there were
    not stay."""
    with ranks.together("load", folder=str(folder)), _without_group():
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
        stepped = any(name.startswith("optimizer.") for name in stored)
        parts = _parts(model, optimizer if stepped else None, ranks)
        parts["rng"] = {name: rng for name, rng in parts["rng"].items() if f"rng.{name}" in stored}
        load(parts, checkpoint_id=folder)
        sharded.set_model_state_dict(model, parts["model"], options=_OPTIONS)
        optimizer.state.clear()
        if stepped:
            sharded.set_optimizer_state_dict(model, optimizer, parts["optimizer"], options=_OPTIONS)
        for name, rng in parts["rng"].items():
            (torch.cuda if name.startswith("cuda") else torch).set_rng_state(rng)


def matches_model(folder: Path, model: Any) -> bool:
    """True if the checkpoint's weights have the model's names and shapes."""
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    sizes = {
        name.removeprefix("model."): entry.size
        for name, entry in stored.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    weights = untied(model, sharded.get_model_state_dict(model, options=_OPTIONS))
    return sizes == {name: tensor.shape for name, tensor in weights.items()}


def untied(model: Any, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The weights without those that are others' under a second name."""
    ties = bool(getattr(model.config, "tie_word_embeddings", False))
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if ties else set()
    return {name: tensor for name, tensor in weights.items() if name not in tied}


def _parts(model: Any, optimizer: torch.optim.Optimizer | None, ranks: Ranks) -> dict[str, Any]:
    """What torch.distributed.checkpoint writes, and reads into."""
    weights = sharded.get_model_state_dict(model, options=_OPTIONS)
    generators = {f"cpu-{ranks.rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators[f"cuda-{ranks.rank}"] = torch.cuda.get_rng_state()
    parts = {"model": untied(model, weights), "rng": generators}
    if optimizer is not None:
        parts["optimizer"] = sharded.get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
    return parts


@contextmanager
def _without_group() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        yield
