"""The served weights in memory: deltas build on them, and the engine is given tensors of them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ibtree.errors import FieldError
from ibtree.weights.delta import Bits, apply, bits
from ibtree.weights.manifest import TensorSpec, WeightManifest, digest_of
from ibtree.weights.model_folder import checkpoint_specs, weight_files
from ibtree.weights.tensor_files import DTYPE_BYTES, mapped, read_header, write_file
from server_ext.weights.manifest import check_digests, check_file
from server_ext.weights.store import Serving, StoredWeights, WeightStore

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)
_THREADS = 2
_PIECE_BYTES = 2**18
"""Bytes read and hashed at a time, while it is in the processor's cache."""


class HostCopy:
    """One version's tensors, changed in place: memory never holds a second version.

    A method that raises FieldError may leave them half changed: `version` is then None.
    """

    def __init__(self, store: WeightStore, model_dir: Path) -> None:
        self._store, self._model_dir = store, model_dir
        self._values: dict[str, Bits] = {}
        self.specs: dict[str, TensorSpec] = {}
        """The tensors that are here, with the digests of their bytes."""
        self.version: Serving | None = Serving()
        """The version that is here; None: it may be a mix."""

    def receive(self, manifest: WeightManifest) -> None:
        """Makes it the version in the staging file. Raises FieldError unless that is as
        announced."""
        path = self._store.staging
        check_file(path, manifest)
        self.version = None
        if manifest.base_version is None:
            self.read_files([path])
        else:
            self.apply_delta(path)
        check_digests(self.specs, manifest)
        self.version = Serving(manifest.version, manifest.digest)

    def load(self, stored: StoredWeights) -> None:
        """Makes it this version of the store. Raises FieldError if its files are damaged."""
        wanted = Serving(stored.version, stored.digest)
        if self.version == wanted:
            return
        files = self._store.files(stored)
        for path in files:
            if not path.is_file():
                raise FieldError("data_dir", f"{path} is missing", "put it back, or start anew")
        self.version = None
        self.read_files(files)
        if self.digest != stored.digest:
            raise FieldError("data_dir", f"{files[-1]} is damaged", "put it back, or start anew")
        self.version = wanted

    def reload_served(self) -> None:
        """Makes it the served version again after a rejection. If that fails, deltas are refused
        until a whole version came."""
        try:
            if self._store.retained:
                self.load(self._store.retained[-1])
            else:
                self._clear()
                self.version = Serving()
        except Exception:
            _log.exception("the served version is not in the host copy any more")

    def read_files(self, files: Iterable[Path]) -> None:
        """Makes it what a whole file and the deltas on it give."""
        whole, *deltas = files
        start, header = read_header(whole)
        self._each(sorted(header), partial(self._read, whole, start, header))
        for path in deltas:
            self.apply_delta(path)

    def apply_delta(self, delta: Path) -> None:
        """Makes it what the delta gives on what is here."""
        records = mapped(delta)
        for name in records:
            if name not in self.specs:
                raise FieldError("weights", f"a delta of {name}, which is not there", "a known one")
        self._each(records, lambda name: self._apply(name, records[name].data))

    @property
    def digest(self) -> bytes:
        """WeightManifest.digest of what is here; empty if nothing was loaded."""
        return digest_of(self.specs.values()) if self.specs else b""

    def specs_of(self, serving: Serving) -> dict[str, TensorSpec]:
        """Tensors that the engine has for certain while it serves this: those that are here, unless
        a rejection left another version behind."""
        return dict(self.specs) if self.version == serving else {}

    def changed(self, before: Mapping[str, TensorSpec]) -> list[str]:
        """Names of the tensors that differ from those before; at least one, with which the
        engine takes the version's number."""
        specs = self.specs
        changed = [name for name in specs if specs[name] != before.get(name)]
        return changed or [min(specs, key=lambda name: (len(specs[name].shape), name))]

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """These tensors, without copies: they change with the next version."""
        import torch  # not before it is needed

        dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        for name in names:
            spec = self.specs[name]
            raw = torch.from_numpy(self._values[name].view(np.uint8))
            yield name, raw.view(dtypes[spec.dtype]).reshape(spec.shape)

    def served(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors of the served version, which must be here; the model folder's if none was
        pushed."""
        if self._store.retained:
            yield from self.tensors(self.specs)
            return
        from safetensors import safe_open

        wanted = checkpoint_specs(self._model_dir)
        for path in weight_files(self._model_dir):
            with safe_open(path, "pt") as file:  # imports torch: not before it is needed
                for name in sorted(wanted.keys() & file.keys()):
                    yield name, file.get_tensor(name)

    def write(self, path: Path) -> None:
        """Writes a whole file of what is here."""
        write_file(
            path,
            {
                name: (spec.dtype, spec.shape, self._values[name].data.cast("B"))
                for name, spec in sorted(self.specs.items())
            },
        )

    def _clear(self) -> None:
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
