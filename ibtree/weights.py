"""Weight versions as manifests, and the identity of a model folder: hashing and headers only.

A version travels as one safetensors file (8 bytes little-endian header length, JSON header, raw
tensor bytes), whole or a delta (weight_delta.py), described by a manifest that holds a SHA-256 of
each tensor's bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ibtree.errors import FieldError

CHUNK_BYTES = 2 * 1024 * 1024
"""Most bytes of a chunk."""
SENT_BYTES = 256 * 1024
"""Bytes of the chunks that clients send: gRPC holds several messages at a time."""
DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_HASHING_THREADS = 2
_MAX_HEADER_BYTES = 100 * 1024 * 1024
_IDENTITY_KEYS = (
    "architectures",
    "num_attention_heads",
    "num_key_value_heads",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rms_norm_eps",
    "hidden_act",
    "sliding_window",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a version; `sha256` is over its bytes, little endian, row major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: bytes = b""


@dataclass(frozen=True)
class MappedTensor:
    """A tensor in a file: its spec without digest, and its bytes, mapped."""

    spec: TensorSpec
    data: memoryview


@dataclass(frozen=True)
class Canary:
    """What the new weights give: ln softmax(logits) of the last len(logprobs) of the token ids
    [nats], and the greatest difference that is taken for agreement [nats]."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    tolerance: float


@dataclass(frozen=True)
class WeightManifest:
    """A weight version: its tensors, and the file that gives them, on its base if it has one."""

    version: int
    model_id: str
    tensors: tuple[TensorSpec, ...]
    file_bytes: int
    base_version: int | None = None
    base_digest: bytes = b""
    canary: Canary | None = None

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over the tensors in order of name: the identity of what is served. [32 bytes]"""
        return digest_of(self.tensors)


def digest_of(tensors: Iterable[TensorSpec]) -> bytes:
    """WeightManifest.digest of these tensors."""
    total = hashlib.sha256()
    for t in sorted(tensors, key=lambda t: t.name):
        total.update(json.dumps([t.name, t.dtype, list(t.shape), t.sha256.hex()]).encode())
    return total.digest()


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
    found = {}
    for name, entry in sorted(header.items()):
        low, high = entry["data_offsets"]
        spec = TensorSpec(name, entry["dtype"], tuple(entry["shape"]))
        found[name] = MappedTensor(spec, data[start + low : start + high])
    return found


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


def checkpoint_specs(model_dir: Path) -> dict[str, TensorSpec]:
    """Names, dtypes and shapes of a Hugging Face folder's safetensors, digests left empty.

    Raises FieldError if the folder holds none.
    """
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise FieldError("model", f"{model_dir} holds no *.safetensors", "a Hugging Face folder")
    return {
        name: TensorSpec(name, entry["dtype"], tuple(entry["shape"]))
        for path in files
        for name, entry in read_header(path)[1].items()
    }


def model_identity(model_dir: Path) -> str:
    """Digest of a model's tensors (names, shapes), of what its configuration says of the forward
    pass, and of its tokenizer: 64 hex characters.

    Two checkpoints of one training run have the same identity; another architecture, size or
    vocabulary has another. Raises FieldError if `model_dir` is not a Hugging Face folder.
    """
    if not (model_dir / "config.json").is_file():
        raise FieldError("model", f"{model_dir} has no config.json", "a Hugging Face model folder")
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        tokenizer = model_dir / "tokenizer.json"
        vocabulary = json.loads(tokenizer.read_text("utf-8")) if tokenizer.is_file() else {}
    except ValueError as error:
        raise FieldError(
            "model", f"{model_dir} holds broken JSON ({error})", "a whole folder"
        ) from error
    total = hashlib.sha256()
    total.update(json.dumps([config.get(key) for key in _IDENTITY_KEYS]).encode())
    for spec in sorted(checkpoint_specs(model_dir).values(), key=lambda t: t.name):
        total.update(json.dumps([spec.name, list(spec.shape)]).encode())
    parts = [vocabulary.get("model"), vocabulary.get("added_tokens")]
    total.update(json.dumps(parts, sort_keys=True).encode())
    return total.hexdigest()
