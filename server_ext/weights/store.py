"""The weight versions on disk: what is kept, which one serves.

    <dir>/receiving-<n>.part            a push in progress; removed when the store is opened
    <dir>/staging.part                  a received push that is being verified; likewise
    <dir>/spare.part                    the file of a dropped version: the next push writes over it,
                                        which is faster than taking as much of the disk anew
    <dir>/<version>.safetensors         a verified version, whole
    <dir>/<version>.delta.safetensors   a verified version as a delta on its base
    <dir>/serving.json                  the model, and the kept versions, the last of which serves:
                                        replaced atomically after a version was applied

So a restart serves exactly the version before or the version after an interrupted push. Files that
no kept version needs are removed after the next one serves.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ibtree.errors import FieldError
from ibtree.messages import KeptWeights

_WHOLE, _DELTA = ".safetensors", ".delta.safetensors"
_LONGEST_CHAIN = 8
"""Files of one version: a restart should read little more than its bytes."""


@dataclass(frozen=True)
class Serving:
    """The version that serves; version 0 with an empty digest is the model folder itself."""

    version: int = 0
    digest: bytes = b""


@dataclass(frozen=True)
class StoredWeights(KeptWeights):
    """A version that served: `files` are the whole file and the deltas on it that give it."""

    files: tuple[str, ...] = ()


class WeightStore:
    """One folder, one writer."""

    def __init__(self, directory: Path, model_id: str, keep: int = 4) -> None:
        """`keep`: how many versions that served stay, the present one included.

        Raises FieldError if the list of versions is damaged, or of another model.
        """
        self._dir, self._model_id, self._most_retained = directory, model_id, keep
        self._dir.mkdir(parents=True, exist_ok=True)
        self.folder, self.staging = directory, directory / "staging.part"
        for left in (self.staging, *directory.glob("receiving-*.part")):
            left.unlink(missing_ok=True)
        self.spare = self._dir / "spare.part"
        self._pointer = self._dir / "serving.json"
        self.retained = self._read()
        """Oldest first, the last one serves; empty if nothing did."""
        if not self._pointer.is_file():
            self._point_at(())  # whose folder it is

    def _read(self) -> tuple[StoredWeights, ...]:
        if not self._pointer.is_file():
            return ()
        try:
            content = json.loads(self._pointer.read_text())
            retained = tuple(_entry(**entry) for entry in content["kept"])
            model_id = str(content["model_id"])
        except (ValueError, TypeError, KeyError) as error:
            problem = f"{self._pointer} is damaged ({error!r})"
            raise FieldError("data_dir", problem, "remove it to start from the model") from error
        if model_id != self._model_id:
            raise FieldError(
                "data_dir",
                f"{self._dir} keeps weights of model {model_id[:12]}…, and --model is "
                f"{self._model_id[:12]}…",
                f"another folder, the model they are of, or {self._dir} removed",
            )
        return retained

    def serving(self) -> Serving:
        """What served last."""
        if not self.retained:
            return Serving()
        return Serving(self.retained[-1].version, self.retained[-1].digest)

    def files(self, version: StoredWeights) -> list[Path]:
        """The whole file and the deltas that give it, in order."""
        return [self._dir / name for name in version.files]

    def takes_delta(self) -> bool:
        """Whether a delta may be kept as it is; if not, its result has to be."""
        return bool(self.retained) and len(self.retained[-1].files) < _LONGEST_CHAIN

    def sync_staging(self) -> None:
        with self.staging.open("rb") as file:
            os.fsync(file.fileno())

    def keep(self, version: int, *, delta: bool = False) -> tuple[str, ...]:
        """Makes the staged file durable; returns the files that give the version."""
        self.sync_staging()
        name = f"{version}{_DELTA if delta else _WHOLE}"
        self.staging.rename(self._dir / name)
        self._sync()
        return (*self.retained[-1].files, name) if delta else (name,)

    def serve(self, version: StoredWeights) -> None:
        """Makes a version the served one, durably."""
        self._point_at((*self.retained, version)[-self._most_retained :])

    def drop(self) -> None:
        """Removes the files that no kept version needs, but for one whole one, the spare. Takes
        long for large ones."""
        needed = {name for version in self.retained for name in version.files}
        for path in self._dir.glob("*.safetensors"):
            if path.name.partition(".")[0].isdecimal() and path.name not in needed:
                with suppress(OSError):  # what cannot be dropped now is dropped the next time
                    if path.name.endswith(_DELTA) or path.is_symlink() or path.stat().st_nlink > 1:
                        path.unlink()  # a backup may link to it: it must not be written over
                    else:
                        path.replace(self.spare)

    def put_back(self, retained: tuple[StoredWeights, ...]) -> None:
        """Undoes a `serve` that failed half-way: `retained` as it was before."""
        if self.retained != retained:
            self._point_at(retained)

    def _point_at(self, retained: tuple[StoredWeights, ...]) -> None:
        fresh = self._pointer.with_suffix(".new")
        entries = [asdict(version) | {"digest": version.digest.hex()} for version in retained]
        with fresh.open("w") as file:
            json.dump({"model_id": self._model_id, "kept": entries}, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(self._pointer)
        self.retained = retained
        self._sync()

    def _sync(self) -> None:
        handle = os.open(self._dir, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _entry(*, digest: str, files: list[str], **rest: Any) -> StoredWeights:
    return StoredWeights(digest=bytes.fromhex(digest), files=tuple(files), **rest)
