"""How a version's file reaches the server: sent in chunks, or left in a folder that both see."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Protocol

from ibtree.messages import PushOutcome
from ibtree.weights.manifest import WeightManifest


class Pusher(Protocol):
    """What a transport needs of a client."""

    def push_weights(
        self,
        manifest: WeightManifest,
        path: Path,
        *,
        shared_path: str = "",
        timeout_s: float = 600.0,
        wait: bool = False,
    ) -> PushOutcome: ...


class Transport(Protocol):
    """Returns when the version serves. Raises RpcFailed."""

    def push(
        self, manifest: WeightManifest, path: Path, *, timeout_s: float, wait: bool = False
    ) -> PushOutcome: ...


class StreamTransport:
    """Sends the file; what has arrived of it is not sent again after a broken stream."""

    def __init__(self, pusher: Pusher) -> None:
        self._pusher = pusher

    def push(
        self, manifest: WeightManifest, path: Path, *, timeout_s: float, wait: bool = False
    ) -> PushOutcome:
        return self._pusher.push_weights(manifest, path, timeout_s=timeout_s, wait=wait)


class SharedFolderTransport:
    """Puts the file into the folder that the server knows as its --shared-dir, and says where."""

    def __init__(self, pusher: Pusher, folder: Path, name: str = "") -> None:
        """`name` of its file, which no other pusher uses: one that was killed leaves it behind, and
        its next run takes it again. Empty: a new name for each push."""
        self._pusher, self._folder, self._name = pusher, folder, name

    def push(
        self, manifest: WeightManifest, path: Path, *, timeout_s: float, wait: bool = False
    ) -> PushOutcome:
        name = f"push-{self._name or uuid.uuid4().hex}.safetensors"
        copy_path = self._folder / name
        try:
            with path.open("rb") as source, copy_path.open("wb") as target:
                shutil.copyfileobj(source, target)
                target.flush()
                os.fsync(target.fileno())  # another machine may be the one that reads it
            return self._pusher.push_weights(
                manifest, path, shared_path=name, timeout_s=timeout_s, wait=wait
            )
        finally:
            copy_path.unlink(missing_ok=True)
