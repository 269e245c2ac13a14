"""`make bench-service`: trees through gRPC beside the same grower called in process, on one engine.

The client is a process of its own. Both ways take turns on the same problems; a ratio is the
median over pairs. Then trees are cancelled, and 1,000 prompts go through the queue while the
server's memory is watched.
"""

from __future__ import annotations

import server_ext.engine.cpu  # isort: skip  # noqa: F401  first: SGLang's children re-import this module

import argparse
import asyncio
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from figures import show
from forest_on import forest_on

HERE = Path(__file__).parent
OUT = HERE / "out" / "service.json"
ARITH = HERE.parent / "examples" / "arith"
MODEL = ARITH / "model"
IN_FLIGHT = [1, 16, 64]
WAVES = 3
"""Times as many trees as are in flight: of one wave, start and end would be half of the time."""
TREES = 400
"""Fewest, in all pairs: the machine's speed changes within seconds, so pairs of few are short."""
QUEUED = 1000


def rss_mb() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Served:
    """An engine, a forest on it, and the two services that clients use, over loopback."""

    def __init__(self, folder: Path) -> None:
        from ibtree.tree.options import SamplingOptions, TreeOptions
        from server_ext.engine.sglang import SglangEngine
        from server_ext.rewards.base import Graders
        from server_ext.rewards.exact import ExactGrader
        from server_ext.trees.text import Tokenizer

        self.engine = SglangEngine(str(MODEL), "cpu", "float32", 600.0, [])
        sampling = SamplingOptions(temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=128)
        graders = Graders({"exact": ExactGrader("####")})
        self.forest = forest_on(
            self.engine, Tokenizer(MODEL), graders, TreeOptions(sampling=sampling), "exact"
        )
        self._folder = folder

    async def start(self) -> str:
        """The address it serves on."""
        from ibtree.tree.options import SamplingOptions
        from ibtree.wire.messages import prompt_from_bytes
        from ibtree.wire.trees import tree_to_bytes
        from server_ext.queue.journal import Journal
        from server_ext.queue.journal_thread import JournalThread
        from server_ext.queue.producer import Producer
        from server_ext.services.channel import grpc_server
        from server_ext.services.queue import QueueService
        from server_ext.services.sampling import SamplingService

        await self.engine.generate("first-token", [0], SamplingOptions(max_new_tokens=1), 1)
        defaults = self.forest.defaults
        self.journal = JournalThread(partial(Journal, self._folder / "journal.sqlite"))
        producer = Producer(
            self.journal,
            self.forest,
            lambda data: prompt_from_bytes(data, defaults),
            tree_to_bytes,
        )
        sampling = SamplingService(self.forest, self.journal, producer, 100_000)
        queue = QueueService(self.journal, producer, 600.0, lambda: sampling.interactive)
        self.server = grpc_server(1000, 30.0)
        sampling.add_to(self.server)
        queue.add_to(self.server)
        address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        await self.server.start()
        self.producing = asyncio.create_task(producer.run())
        return address

    async def grow(self, problems: list[Any], in_flight: int) -> float:
        """Trees per second without gRPC."""
        from ibtree.messages import Prompt

        permits = asyncio.Semaphore(in_flight)

        async def grow_one(problem: Any) -> None:
            async with permits:
                job = self.forest.check(Prompt(problem.prompt, "", problem.answer))
                await self.forest.grow(job, lambda _: None, time.time())

        began = time.perf_counter()
        await asyncio.gather(*(grow_one(problem) for problem in problems))
        return len(problems) / (time.perf_counter() - began)

    async def stop(self) -> None:
        self.producing.cancel()
        await self.server.stop(0)
        self.journal.close()


async def client(address: str) -> None:
    """The child: a JSON line {in_flight, problems} in, a line of trees per second out."""
    from ibtree.client import AsyncClient
    from ibtree.messages import Prompt

    async with AsyncClient(address) as calls:
        while line := await asyncio.to_thread(sys.stdin.readline):
            command = json.loads(line)
            permits = asyncio.Semaphore(command["in_flight"])

            async def sample_one(
                prompt: str, answer: str, permits: asyncio.Semaphore = permits
            ) -> None:
                async with permits:
                    await calls.sample_tree(Prompt(prompt, "", answer))

            began = time.perf_counter()
            await asyncio.gather(*(sample_one(*problem) for problem in command["problems"]))
            print(len(command["problems"]) / (time.perf_counter() - began), flush=True)


class Client:
    """The other end of the child. (Not asyncio's: SGLang replaces the loop policy under it.)"""

    def __init__(self, address: str) -> None:
        command = [sys.executable, __file__, "--client", address]
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1)

    def stop(self) -> None:
        self._child.terminate()
        self._child.wait()

    async def grow(self, problems: list[Any], in_flight: int) -> float:
        """Trees per second through gRPC."""
        asked = [[problem.prompt, problem.answer] for problem in problems]
        line = json.dumps({"in_flight": in_flight, "problems": asked}) + "\n"
        assert self._child.stdin and self._child.stdout
        self._child.stdin.write(line)
        return float(await asyncio.to_thread(self._child.stdout.readline))


async def throughput(
    served: Served, child: Client, loads: list[int], pairs: int, problems: Any
) -> dict[str, float]:
    """Medians over pairs that take turns at being first."""
    figures: dict[str, float] = {}
    for in_flight in loads:
        ratios, rates = [], []
        count = WAVES * in_flight
        for pair in range(max(pairs, math.ceil(TREES / count))):
            chosen = problems(count, 6, 1000 * in_flight + pair)
            ways = [served.grow, child.grow]
            if pair % 2:
                ways.reverse()
            await ways[0](chosen[:in_flight], in_flight)  # both find the cache alike
            took = {way: await way(chosen, in_flight) for way in ways}
            ratios.append(took[child.grow] / took[served.grow])
            rates.append(took[child.grow])
        figures[f"throughput_ratio_{in_flight}"] = statistics.median(ratios)
        figures[f"trees_per_s_{in_flight}"] = statistics.median(rates)
    return figures


async def cancellation(served: Served, problems: Any) -> dict[str, float]:
    """Seconds from the cancellation of 64 growing trees until the engine runs nothing."""
    from engines import flush

    took = []
    for attempt in range(5):
        growing = asyncio.create_task(served.grow(problems(64, 10, attempt), 64))
        while served.forest.slots.in_flight < 128:
            await asyncio.sleep(0.01)
        growing.cancel()
        began = time.perf_counter()
        await asyncio.wait([growing])
        await flush(served.engine)  # refused while anything runs
        took.append(time.perf_counter() - began)
    return {"cancel_frees_s": statistics.median(took)}


async def memory(served: Served, address: str, problems: Any) -> dict[str, float]:
    """1,000 prompts queued at once; the growth of memory is from the first hundred trees on."""
    from ibtree.client import AsyncClient
    from ibtree.messages import Prompt

    chosen = problems(QUEUED, 6, 7)
    prompts = [Prompt(p.prompt, f"queued-{i}", p.answer) for i, p in enumerate(chosen)]
    seen: list[float] = []
    async with AsyncClient(address) as calls:
        await calls.submit_prompts(prompts)
        done = 0
        while done < QUEUED:
            leases = await calls.lease_trees(32, wait_s=60)
            await calls.ack_trees([lease.lease_id for lease in leases])
            done += len(leases)
            if done >= 100:
                seen.append(rss_mb())
    return {"queued_memory_growth": max(seen) / seen[0], "queued_memory_mb": max(seen)}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--in-flight", type=int, nargs="*", default=IN_FLIGHT)
    parser.add_argument("--client", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client:
        return await client(arguments.client)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(ARITH))
    from task import problems

    with tempfile.TemporaryDirectory() as folder:
        served = Served(Path(folder))
        try:
            address = await served.start()
            child = Client(address)
            try:
                figures = await throughput(
                    served, child, arguments.in_flight, arguments.pairs, problems
                )
            finally:
                child.stop()
            figures |= await cancellation(served, problems)
            figures |= await memory(served, address, problems)
            await served.stop()
        finally:
            served.engine.shutdown()
    show("through gRPC, beside the grower called in process", figures, OUT)
    return None


if __name__ == "__main__":
    asyncio.run(main())
