"""The served weights in memory: deltas build on them, and the engine is given tensors of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ibtree.errors import FieldError
from ibtree.weight_delta import Bits, apply, bits
from ibtree.weights import DTYPE_BYTES, TensorSpec, digest_of, mapped, read_header, write_file

if TYPE_CHECKING:
    import torch

_THREADS = 2
_PIECE_BYTES = 2**18
"""Read and hashed at a time, while it is in the processor's cache."""


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
        start, header = read_header(whole)
        self._each(sorted(header), partial(self._read, whole, start, header))
        for path in deltas:
            self.add(path)

    def add(self, delta: Path) -> None:
        """Turns what it holds into the next version."""
        records = mapped(delta)
        for name in records:
            if name not in self.specs:
                raise FieldError("weights", f"a delta of {name}, which is not there", "a known one")
        self._each(records, lambda name: self._apply(name, records[name].data))

    def clear(self) -> None:
        self._values, self.specs = {}, {}

    def _each(self, names: Iterable[str], change: Callable[[str], TensorSpec]) -> None:
        with ThreadPoolExecutor(_THREADS) as pool:
            self.specs |= {spec.name: spec for spec in pool.map(change, names)}

    def _read(self, path: Path, start: int, header: Mapping[str, Any], name: str) -> TensorSpec:
        entry = header[name]
        low, high = entry["data_offsets"]
        values, width = self._values.get(name), DTYPE_BYTES.get(entry["dtype"])
        if values is None or (values.nbytes, values.itemsize) != (high - low, width):
            values = self._values[name] = bits(bytearray(high - low), entry["dtype"])
        digest, left = hashlib.sha256(), values.data.cast("B")
        with path.open("rb", buffering=0) as file:  # mapping it would cost a fault a page
            file.seek(start + low)
            while left:
                count = file.readinto(left[:_PIECE_BYTES])
                if not count:
                    raise FieldError("weights", f"{path.name} is cut", "a whole file")
                digest.update(left[:count])
                left = left[count:]
        return TensorSpec(name, entry["dtype"], tuple(entry["shape"]), digest.digest())

    def _apply(self, name: str, records: memoryview) -> TensorSpec:
        digest = hashlib.sha256()
        apply(self._values[name], records, digest.update)
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
        """These tensors, without copies: they change with the next `load` or `add`."""
        import torch  # not before it is needed

        dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        for name in names:
            spec = self.specs[name]
            raw = torch.from_numpy(self._values[name].view(np.uint8))
            yield name, raw.view(dtypes[spec.dtype]).reshape(spec.shape)
