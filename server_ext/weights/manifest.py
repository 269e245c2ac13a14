"""Whether an announced version fits the model, and a file what was announced."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ibtree.errors import FieldError, PreconditionError
from ibtree.weights.manifest import TensorSpec, WeightManifest
from ibtree.weights.tensor_files import DTYPE_BYTES, mapped
from server_ext.weights.store import Serving, StoredWeights

_HEADER_BYTES_PER_TENSOR = 4096
_VERSIONS = 2**63  # trees carry them as 64-bit integers
_LONGEST_JUMP = 2**32
"""Versions only grow: one far ahead would leave no numbers for those that are to follow."""
_MOST_RUN_ID = 200


def check_version(manifest: WeightManifest, serving: Serving) -> None:
    """Raises FieldError or PreconditionError unless it may follow the served version."""
    last = min(serving.version + _LONGEST_JUMP, _VERSIONS - 1)
    if manifest.version > last:
        problem = f"got {manifest.version}"
        raise FieldError("manifest.version", problem, f"{serving.version + 1} to {last}")
    if manifest.version <= serving.version:
        raise PreconditionError(
            f"version: {manifest.version} is not newer than the served {serving.version}"
        )


def check_number(version: int) -> None:
    """Raises PreconditionError if there is no such version number."""
    if version >= _VERSIONS:
        raise PreconditionError(f"version: no number is left after {version - 1}")


def check_run(manifest: WeightManifest, retained: Sequence[StoredWeights]) -> None:
    """Raises PreconditionError if another run published the version that serves, FieldError for a
    run that cannot be named. What is pushed by hand names none."""
    run_id, other = manifest.run_id, retained[-1].run_id if retained else ""
    if len(run_id) > _MOST_RUN_ID or not run_id.isprintable():
        problem = f"{len(run_id)} characters, printable: {run_id.isprintable()}"
        raise FieldError("manifest.run_id", problem, f"up to {_MOST_RUN_ID} printable characters")
    if run_id and other and run_id != other and not manifest.take_over:
        raise PreconditionError(
            f"run_id: run {other} published version {retained[-1].version}, which is served, and "
            f"one run publishes at a time; this is run {run_id}. Stop the other one and let this "
            "one take over (ibtpo-learner --take-over true), or give each a server of its own"
        )


def check_base(manifest: WeightManifest, serving: Serving, held: Serving | None) -> None:
    """Raises PreconditionError for a delta on another version than the served one, which has to be
    the one held in memory."""
    if manifest.base_version is None:
        return
    base = Serving(manifest.base_version, manifest.base_digest)
    if not base.digest or not base == serving == held:
        known = held if held and held.digest else None
        has = f"version {known.version} ({known.digest.hex()[:12]}…)" if known else "none"
        raise PreconditionError(
            f"base_version: the delta builds on version {base.version} "
            f"({base.digest.hex()[:12]}…), this server holds {has}; push a whole version"
        )


def check_tensors(manifest: WeightManifest, specs: Mapping[str, TensorSpec], dtype: str) -> None:
    """Raises PreconditionError unless the announced tensors are exactly the model's."""
    names = [t.name for t in manifest.tensors]
    for name in (*sorted(set(names) - set(specs)), *sorted(set(specs) - set(names))):
        known = "is missing" if name in specs else "is not in the model"
        raise PreconditionError(f"tensors: {name!r} {known}; push exactly the model's tensors")
    if len(set(names)) != len(names):
        raise PreconditionError("tensors: a name stands twice; push each tensor once")
    for t in manifest.tensors:
        if t.shape != specs[t.name].shape:
            expected = list(specs[t.name].shape)
            raise PreconditionError(
                f"tensors: {t.name!r} has shape {list(t.shape)}, the model {expected}"
            )
        if t.dtype != dtype:
            raise PreconditionError(
                f"tensors: {t.name!r} has dtype {t.dtype}, the server takes {dtype}"
            )


def check_size(manifest: WeightManifest) -> None:
    """Raises FieldError for a file that is too small, or larger than a whole one can be."""
    data_bytes = sum(DTYPE_BYTES[t.dtype] * math.prod(t.shape) for t in manifest.tensors)
    most = data_bytes + _HEADER_BYTES_PER_TENSOR * (len(manifest.tensors) + 1)
    least = data_bytes if manifest.base_version is None else 0
    if not least < manifest.file_bytes <= most:
        raise FieldError("manifest.file_bytes", f"got {manifest.file_bytes}", f"({least}, {most}]")


def check_file(path: Path, manifest: WeightManifest) -> None:
    """Raises FieldError unless the file holds the announced tensors, by name, dtype and shape; of a
    delta any of them, as records."""
    in_file = {name: tensor.spec for name, tensor in mapped(path).items()}
    whole = manifest.base_version is None
    for announced in manifest.tensors:
        spec = in_file.pop(announced.name, None)
        if spec is None and whole:
            raise FieldError("weights", f"{announced.name} is not in the file", "as announced")
        expected = (announced.dtype, announced.shape) if whole else ("U8", spec and spec.shape)
        if spec and (spec.dtype, spec.shape) != expected:
            raise FieldError("weights", f"wrong dtype or shape of {announced.name}", "as announced")
    for name in in_file:
        raise FieldError("weights", f"the file holds {name}, not announced", "as announced")


def check_digests(specs: Mapping[str, TensorSpec], manifest: WeightManifest) -> None:
    """Raises FieldError unless these are the announced tensors to the bit."""
    for announced in manifest.tensors:
        if specs[announced.name] != announced:
            raise FieldError("weights", f"wrong digest of {announced.name}", "as announced")
