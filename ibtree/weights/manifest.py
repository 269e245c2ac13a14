"""What a weight version is: a manifest with a SHA-256 of each tensor's bytes.

A version travels as one safetensors file (tensor_files.py), whole or a delta (delta.py), in chunks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

CHUNK_BYTES = 2 * 1024 * 1024
"""Most bytes of a chunk."""
SENT_BYTES = 256 * 1024
"""Bytes of the chunks that clients send: gRPC holds several messages at a time."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a version; `sha256` is over its bytes, little endian, row major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: bytes = b""


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
    run_id: str = ""
    """Run that publishes it; empty: pushed by hand."""
    take_over: bool = False
    """Whether it may follow another run's version."""

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
