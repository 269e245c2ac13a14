"""Whether an announced version fits the model, and a file what was announced."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from ibtree.errors import FieldError, PreconditionError
from ibtree.weights.manifest import TensorSpec, WeightManifest
from ibtree.weights.tensor_files import DTYPE_BYTES, mapped
from server_ext.weights.store import Serving

_HEADER_BYTES_PER_TENSOR = 4096
_VERSIONS = 2**63  # trees carry them as 64-bit integers


def check_version(manifest: WeightManifest, serving: Serving) -> None:
    """Raises FieldError or PreconditionError unless it may follow the served version."""
    if manifest.version >= _VERSIONS:
        problem = f"got {manifest.version}"
        raise FieldError("manifest.version", problem, f"above the served one, below {_VERSIONS}")
    if manifest.version <= serving.version:
        raise PreconditionError(
            f"version: {manifest.version} is not newer than the served {serving.version}"
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
