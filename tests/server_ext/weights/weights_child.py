"""Run as a process: a server of weights on a real port with the fake engine.

    python -m tests.server_ext.weights.weights_child FOLDER [STATE]

Says its port, what it serves and a digest of what its engine holds; with STATE it says so on
entering that state and waits there to be killed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from pathlib import Path

from tests.server_ext.fakes import FakeEngine
from tests.server_ext.site import Site
from tests.server_ext.versions import Tensors


def fingerprint(weights: Tensors) -> str:
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(name.encode() + weights[name].numpy().tobytes())
    return total.hexdigest()


def say(**line: object) -> None:
    print(json.dumps(line), flush=True)


async def main(folder: str, state: str) -> None:
    site = Site(Path(folder))
    enter = site.updater._enter

    def stop_at(entered: str, version: int) -> None:
        enter(entered, version)  # type: ignore[arg-type]
        if entered == state:
            say(state=state, version=version)
            time.sleep(600)

    site.updater._enter = stop_at  # type: ignore[method-assign]
    await site.updater.restore()
    async with site:
        assert isinstance(site.engine, FakeEngine)
        serving = site.updater.serving
        say(
            target=site.target,
            version=serving.version,
            digest=serving.digest.hex(),
            engine=site.engine.version,
            weights=fingerprint(site.engine.weights),
        )
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""))
