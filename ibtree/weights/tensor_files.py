"""Safetensors files: headers, mapped tensors, digests. A file is 8 bytes of header length (little
endian), a JSON header, and the raw bytes of the tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ibtree.errors import FieldError
from ibtree.weights.manifest import TensorSpec, WeightManifest

DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_HASHING_THREADS = 2
_MAX_HEADER_BYTES = 100 * 1024 * 1024


@dataclass(frozen=True)
class MappedTensor:
    """A tensor in a file: its spec without digest, and its bytes, mapped."""

    spec: TensorSpec
    data: memoryview


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Offset of the data [bytes] and {name: {dtype, shape, data_offsets}} of a safetensors file.

    Raises FieldError if the file is not a whole safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise FieldError("weights", f"{path.name} is not a safetensors file", "a whole file")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            data_bytes = 0
            for name, entry in sorted(header.items(), key=lambda e: e[1]["data_offsets"]):
                low, high = entry["data_offsets"]
                size_of = DTYPE_BYTES.get(entry["dtype"])
                count = math.prod(entry["shape"])
                if type(low) is not int or type(high) is not int or low != data_bytes or high < low:
                    raise ValueError(f"bad data_offsets of {name}")
                if size_of and high - low != size_of * count:
                    raise ValueError(f"bad data_offsets of {name}")
                data_bytes = high
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            problem = f"{path.name} has a broken safetensors header ({error})"
            raise FieldError("weights", problem, "a whole file") from error
    if 8 + length + data_bytes != size:
        raise FieldError(
            "weights", f"{path.name} is cut or padded", f"{8 + length + data_bytes} bytes"
        )
    return 8 + length, header


def mapped(path: Path) -> dict[str, MappedTensor]:
    """Every tensor of a safetensors file, in order of name. Raises FieldError if it is broken."""
    start, header = read_header(path)
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    tensors = {}
    for name, entry in sorted(header.items()):
        low, high = entry["data_offsets"]
        spec = TensorSpec(name, entry["dtype"], tuple(entry["shape"]))
        tensors[name] = MappedTensor(spec, data[start + low : start + high])
    return tensors


def describe(path: Path) -> tuple[TensorSpec, ...]:
    """Specs of every tensor of a safetensors file, digests computed from its bytes."""
    tensors = mapped(path).values()
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        digests = pool.map(lambda t: hashlib.sha256(t.data).digest(), tensors)
        return tuple(
            replace(t.spec, sha256=digest) for t, digest in zip(tensors, digests, strict=True)
        )


def write_file(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes | memoryview]]
) -> None:
    """Writes a safetensors file of {name: (dtype, shape, bytes)}."""
    header, offset = dict[str, Any](), 0
    for name, (dtype, shape, data) in tensors.items():
        span = [offset, offset + len(data)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(data for _, _, data in tensors.values())


def make_manifest(path: Path, version: int, model_id: str) -> WeightManifest:
    """The manifest of a whole version held in a safetensors file."""
    return WeightManifest(version, model_id, describe(path), path.stat().st_size)
