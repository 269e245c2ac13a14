"""The weight versions on disk: staging, the served version, what is kept.

    <dir>/staging.part            a push in progress; removed when the store is opened
    <dir>/<version>.safetensors   a verified version
    <dir>/serving.json            which version serves: replaced atomically, after it was applied

So a restart serves exactly the version before or the version after an interrupted push.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ibtree.errors import FieldError

_KEPT = 2


@dataclass(frozen=True)
class Serving:
    """The version that serves; version 0 with an empty digest is the model folder itself."""

    version: int = 0
    digest: bytes = b""


class WeightStore:
    """One folder, one writer."""

    def __init__(self, directory: Path, model_id: str) -> None:
        self._dir, self._model_id = directory, model_id
        self._dir.mkdir(parents=True, exist_ok=True)
        self.staging = self._dir / "staging.part"
        self.staging.unlink(missing_ok=True)
        self._pointer = self._dir / "serving.json"

    def path(self, version: int) -> Path:
        return self._dir / f"{version}.safetensors"

    def serving(self) -> Serving:
        """What served last; version 0 if nothing did, or if it was another model.

        Raises FieldError if the pointer is damaged.
        """
        if not self._pointer.is_file():
            return Serving()
        try:
            entry = json.loads(self._pointer.read_text())
            serving = Serving(int(entry["version"]), bytes.fromhex(entry["digest"]))
            other_model = entry["model_id"] != self._model_id
        except (ValueError, TypeError, KeyError) as error:
            problem = f"{self._pointer} is damaged ({error!r})"
            raise FieldError("data_dir", problem, "remove it to start from the model") from error
        return Serving() if other_model else serving

    def keep(self, version: int) -> Path:
        """Makes the staged file durable as this version."""
        with self.staging.open("rb") as file:
            os.fsync(file.fileno())
        self.staging.rename(self.path(version))
        self._sync()
        return self.path(version)

    def serve(self, serving: Serving) -> None:
        """Makes a kept version the served one, durably, and drops old versions."""
        fresh = self._pointer.with_suffix(".new")
        entry = {
            "version": serving.version,
            "digest": serving.digest.hex(),
            "model_id": self._model_id,
        }
        with fresh.open("w") as file:
            json.dump(entry, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(self._pointer)
        self._sync()
        names = (path.stem for path in self._dir.glob("*.safetensors"))
        versions = sorted(int(name) for name in names if name.isdecimal())
        kept = [version for version in versions if version <= serving.version][-_KEPT:]
        for version in versions:
            if version not in kept:
                with suppress(OSError):  # what cannot be dropped now is dropped the next time
                    self.path(version).unlink()

    def _sync(self) -> None:
        handle = os.open(self._dir, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
