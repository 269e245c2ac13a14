"""Run as a process: pushes one version, and stops on the way to be killed.

    python -m tests.server_ext.weights.weights_pusher TARGET FILE VERSION CHUNK_BYTES CHUNKS

Says so after so many chunks, and sends no more.
"""

from __future__ import annotations

import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

from ibtree import Client
from ibtree.weights.tensor_files import make_manifest
from ibtree.wire import messages
from tests.server_ext.versions import MODEL_ID

_push_chunks = messages.push_chunks


def said(path: Path, start: int) -> Any:
    yield from islice(_push_chunks(path, start), chunks)
    print(chunks, flush=True)
    time.sleep(600)


if __name__ == "__main__":
    target, file, version, chunk_bytes, number = sys.argv[1:]
    chunks = int(number)
    messages.SENT_BYTES = int(chunk_bytes)  # type: ignore[misc]
    messages.push_chunks = said
    with Client(target, timeout_s=20) as client:
        client.push_weights(make_manifest(Path(file), int(version), MODEL_ID), Path(file))
