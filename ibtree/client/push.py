"""One push over a stream: what is sent when, and whether a broken stream goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc

from ibtree.client.channel import RpcFailed
from ibtree.messages import PushOutcome
from ibtree.weights.manifest import WeightManifest
from ibtree.wire import messages

_MAX_FAILURES = 5
_FIRST_PAUSE_S = 0.2


class Exchange:
    """What one call sends, in step with what the server answers."""

    def __init__(self, manifest: WeightManifest, path: Path, shared_path: str) -> None:
        self._manifest, self._path, self._shared_path = manifest, path, shared_path
        self._start: SimpleQueue[int | None] = SimpleQueue()
        self.started_at: int | None = None
        """The byte from which on the server wanted the file; None: it has not said."""

    def requests(self) -> Iterator[Any]:
        """Runs in gRPC's thread."""
        yield messages.push_first(self._manifest, self._shared_path)
        start = self._start.get()
        if start is not None:
            yield from messages.push_chunks(self._path, start)

    def answered(self, answer: int | PushOutcome) -> PushOutcome | None:
        """What became of the push, if that is what the server says."""
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
        if self._failures >= _MAX_FAILURES:
            raise failed
        return _FIRST_PAUSE_S * 2.0 ** (self._failures - 1)
