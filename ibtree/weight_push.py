"""How a version's file reaches the server: sent in chunks, or left in a folder that both see."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

import grpc

from ibtree.messages import PushOutcome
from ibtree.rpc import RpcFailed
from ibtree.v1 import weights_pb2
from ibtree.weights import WeightManifest
from ibtree.wire_calls import push_answer, push_chunks, push_first

if TYPE_CHECKING:
    from ibtree.client import Client

_FAILURES = 5
_PAUSE_S = 0.2


class Transport(Protocol):
    """Returns when the version serves. Raises RpcFailed."""

    def push(
        self, manifest: WeightManifest, path: Path, *, timeout_s: float, wait: bool = False
    ) -> PushOutcome: ...


class StreamTransport:
    """Sends the file; what has arrived of it is not sent again after a broken stream."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def push(
        self, manifest: WeightManifest, path: Path, *, timeout_s: float, wait: bool = False
    ) -> PushOutcome:
        return self._client.push_weights(manifest, path, timeout_s=timeout_s, wait=wait)


class SharedFolderTransport:
    """Puts the file into the folder that the server knows as its --shared-dir, and says where."""

    def __init__(self, client: Client, folder: Path, name: str = "") -> None:
        """`name` of its file, which no other pusher uses: one that was killed leaves it behind, and
        its next run takes it again. Empty: a new name for each push."""
        self._client, self._folder, self._name = client, folder, name

    def push(
        self, manifest: WeightManifest, path: Path, *, timeout_s: float, wait: bool = False
    ) -> PushOutcome:
        name = f"push-{self._name or uuid.uuid4().hex}.safetensors"
        placed = self._folder / name
        try:
            with path.open("rb") as source, placed.open("wb") as target:
                shutil.copyfileobj(source, target)
                target.flush()
                os.fsync(target.fileno())  # another machine may be the one that reads it
            return self._client.push_weights(
                manifest, path, shared_path=name, timeout_s=timeout_s, wait=wait
            )
        finally:
            placed.unlink(missing_ok=True)


class Exchange:
    """Of one call: what is sent, in step with what the server answers."""

    def __init__(self, manifest: WeightManifest, path: Path, shared_path: str) -> None:
        self._manifest, self._path, self._shared_path = manifest, path, shared_path
        self._start: SimpleQueue[int | None] = SimpleQueue()
        self.started_at: int | None = None
        """The byte from which on the server wanted the file; None: it has not said."""

    def requests(self) -> Iterator[weights_pb2.PushWeightsRequest]:
        """Runs in gRPC's thread."""
        yield push_first(self._manifest, self._shared_path)
        start = self._start.get()
        if start is not None:
            yield from push_chunks(self._path, start)

    def answered(self, message: weights_pb2.PushWeightsResponse) -> PushOutcome | None:
        """What became of the push, if the server says so."""
        answer = push_answer(message)
        if isinstance(answer, PushOutcome):
            return answer
        self.started_at = answer
        self._start.put(answer)
        return None

    def close(self) -> None:
        self._start.put(None)


class Resumption:
    """Whether a push that failed goes on, and when."""

    def __init__(self) -> None:
        self._failures, self._reached = 0, -1

    def pause_s(self, failed: RpcFailed, started_at: int | None) -> float:
        """Seconds until the next attempt; raises the failure if the server refused, or if it got no
        further in several attempts. `started_at`: see Exchange."""
        if failed.code is not grpc.StatusCode.UNAVAILABLE:
            raise failed
        reached = -1 if started_at is None else started_at
        self._failures = 1 if reached > self._reached else self._failures + 1
        self._reached = max(self._reached, reached)
        if self._failures >= _FAILURES:
            raise failed
        return _PAUSE_S * 2.0 ** (self._failures - 1)
