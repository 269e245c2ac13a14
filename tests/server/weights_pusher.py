"""Run as a process: pushes one version, a chunk at a time.

    python -m tests.server.weights_pusher TARGET FILE VERSION CHUNK_BYTES

Says so before each chunk.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ibtree import Client, weight_push, wire_calls
from ibtree.weights import make_manifest
from tests.server.versions import MODEL_ID

_push_chunks = wire_calls.push_chunks


def said(path: Path, start: int) -> Any:
    for request in _push_chunks(path, start):
        print(request.chunk.offset, flush=True)
        yield request


if __name__ == "__main__":
    target, file, version, chunk_bytes = sys.argv[1:]
    wire_calls.SENT_BYTES = int(chunk_bytes)  # type: ignore[misc]
    weight_push.push_chunks = said
    with Client(target, timeout_s=20) as client:
        client.push_weights(make_manifest(Path(file), int(version), MODEL_ID), Path(file))
