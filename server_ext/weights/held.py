"""Which version the host copy holds, and how it comes to hold another."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ibtree.errors import FieldError
from ibtree.weights import TensorSpec, WeightManifest
from server_ext.weights.host import HostCopy
from server_ext.weights.manifest import check_digests, check_file
from server_ext.weights.store import Serving, StoredWeights, WeightStore

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)


class HeldVersion:
    """The host copy and its version, beside the store whose files give it."""

    def __init__(self, store: WeightStore, model_dir: Path) -> None:
        self._store, self._model_dir = store, model_dir
        self.host = HostCopy()
        self.version: Serving | None = Serving()
        """None: it may be a mix."""

    def take(self, manifest: WeightManifest) -> None:
        """Then holds the version in the staging file. Raises FieldError unless that is as
        announced."""
        path = self._store.staging
        check_file(path, manifest)
        self.version = None
        if manifest.base_version is None:
            self.host.load([path])
        else:
            self.host.add(path)
        check_digests(self.host.specs, manifest)
        self.version = Serving(manifest.version, manifest.digest)

    def hold(self, stored: StoredWeights) -> None:
        """Then holds this version. Raises FieldError if its files are damaged."""
        wanted = Serving(stored.version, stored.digest)
        if self.version == wanted:
            return
        files = self._store.files(stored)
        for path in files:
            if not path.is_file():
                raise FieldError("data_dir", f"{path} is missing", "put it back, or start anew")
        self.version = None
        self.host.load(files)
        if self.host.digest != stored.digest:
            raise FieldError("data_dir", f"{files[-1]} is damaged", "put it back, or start anew")
        self.version = wanted

    def hold_served(self) -> None:
        """After a rejection; without a host copy deltas are refused until a whole version came."""
        try:
            if self._store.kept:
                self.hold(self._store.kept[-1])
            else:
                self.host.clear()
                self.version = Serving()
        except Exception:
            _log.exception("the served version is not in the host copy any more")

    def specs_of(self, serving: Serving) -> dict[str, TensorSpec]:
        """What the engine holds for certain while it serves this: the host copy, unless a rejection
        left that behind."""
        return dict(self.host.specs) if self.version == serving else {}

    def changed(self, before: Mapping[str, TensorSpec]) -> list[str]:
        """What differs from these tensors; at least one tensor, with which the engine takes the
        version's number."""
        specs = self.host.specs
        changed = [name for name in specs if specs[name] != before.get(name)]
        return changed or [min(specs, key=lambda name: (len(specs[name].shape), name))]

    def served(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors of the served version, which it holds; the model folder's if none was
        pushed."""
        if self._store.kept:
            yield from self.host.tensors(self.host.specs)
            return
        from safetensors.torch import load_file  # imports torch: not before it is needed

        for path in sorted(self._model_dir.glob("*.safetensors")):
            yield from load_file(path).items()
