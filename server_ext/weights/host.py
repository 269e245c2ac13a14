"""The served weights in memory: deltas build on them, and the engine is given tensors of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ibtree.errors import FieldError
from ibtree.weight_delta import Bits, apply, bits
from ibtree.weights import MappedTensor, TensorSpec, digest_of, mapped, write_file

if TYPE_CHECKING:
    import torch

_THREADS = 2
_PIECE = 2**20
"""Elements copied and hashed at a time."""


class HostCopy:
    """One version, changed in place: memory never holds a second one.

    A method that raises FieldError may leave it half changed: load it from a version's files again.
    """

    def __init__(self) -> None:
        self._values: dict[str, Bits] = {}
        self.specs: dict[str, TensorSpec] = {}
        """With the digests of the bytes that are here."""

    @property
    def digest(self) -> bytes:
        """As WeightManifest.digest; empty if nothing was loaded."""
        return digest_of(self.specs.values()) if self.specs else b""

    def load(self, files: Iterable[Path]) -> None:
        """Holds what a whole file and the deltas on it give."""
        whole, *deltas = files
        self._each(mapped(whole), self._copy)
        for path in deltas:
            self.add(path)

    def add(self, delta: Path) -> None:
        """Turns what it holds into the next version."""
        records = mapped(delta)
        for name in records:
            if name not in self.specs:
                raise FieldError("weights", f"a delta of {name}, which is not there", "a known one")
        self._each(records, self._apply)

    def clear(self) -> None:
        self._values, self.specs = {}, {}

    def _each(
        self, found: Mapping[str, MappedTensor], change: Callable[[MappedTensor], TensorSpec]
    ) -> None:
        with ThreadPoolExecutor(_THREADS) as pool:
            self.specs |= {spec.name: spec for spec in pool.map(change, found.values())}

    def _copy(self, tensor: MappedTensor) -> TensorSpec:
        name, data = tensor.spec.name, bits(tensor.data, tensor.spec.dtype)
        values = self._values.get(name)
        if values is None or values.dtype != data.dtype or len(values) != len(data):
            values = self._values[name] = np.empty_like(data)
        digest = hashlib.sha256()
        for at in range(0, len(data), _PIECE):
            piece = values[at : at + _PIECE]
            piece[:] = data[at : at + _PIECE]
            digest.update(piece.data)
        return replace(tensor.spec, sha256=digest.digest())

    def _apply(self, records: MappedTensor) -> TensorSpec:
        name, digest = records.spec.name, hashlib.sha256()
        apply(self._values[name], records.data, digest.update)
        return replace(self.specs[name], sha256=digest.digest())

    def write(self, path: Path) -> None:
        """Writes a whole file of what it holds."""
        write_file(
            path,
            {
                name: (spec.dtype, spec.shape, self._values[name].data.cast("B"))
                for name, spec in sorted(self.specs.items())
            },
        )

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Copies of these tensors, one at a time."""
        import torch  # not before it is needed

        dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        for name in names:
            spec = self.specs[name]
            raw = torch.from_numpy(self._values[name].view(np.uint8).copy())
            yield name, raw.view(dtypes[spec.dtype]).reshape(spec.shape)
