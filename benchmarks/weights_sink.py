"""Run as a process: a server of weights without an engine; says what memory a push took.

python benchmarks/weights_sink.py MODEL_FOLDER DATA_FOLDER
"""

from __future__ import annotations

import asyncio
import re
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from ibtree.weights.model_folder import checkpoint_specs
from server_ext.services.channel import SERVER_OPTIONS, keep_message_memory
from server_ext.services.weights import WeightsService
from server_ext.weights.store import WeightStore
from server_ext.weights.updater import WeightUpdater


class NoEngine:
    """Takes tensors and forgets them."""

    context_tokens, dtype, broken = 512, "BF16", asyncio.Event()

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        yield

    async def load(self, tensors: Iterable[tuple[str, Any]], version: int) -> None:
        for _ in tensors:
            await asyncio.sleep(0)


class Memory(threading.Thread):
    """The peak of this process's anonymous memory [bytes]."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    @staticmethod
    def now() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0])

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.005)


async def main(model: Path, data: Path) -> None:
    store = WeightStore(data, "model", keep=1)
    updater = WeightUpdater(NoEngine(), store, model, checkpoint_specs(model), "model")  # type: ignore[arg-type]
    keep_message_memory()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    WeightsService(updater).add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    memory = Memory()
    memory.start()
    print(port, flush=True)
    while await asyncio.to_thread(sys.stdin.readline):  # each line: the peak since the last one
        print(memory.peak, memory.now(), flush=True)
        memory.peak = 0


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
