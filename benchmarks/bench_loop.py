"""`make bench-loop`: how long the server's event loop stands still under load, without a model.

The server's own parts around a recorded engine and a real tokenizer: it gives back texts of a
recorded length after a while, as a GPU would. Meanwhile one client call submits 10,000 prompts of
400 tokens. `--tokenizer DIR` is a Hugging Face folder with a tokenizer and a config.json; without
it, `tokenizers/qwen3` of the folder that IBTPO_TEST_DATA names.

loop_lag_*_ms            how late a task that sleeps for a millisecond wakes up
idle_lag_*_ms            the same with nothing to do
busy_lag_*_ms            the same with nothing to do beside a busy process for each core: what the
                         operating system alone costs
tokens_per_core_second   generated tokens per second of the server process's processor time
in_flight_share          mean rollouts in flight of the most there may be, while four times as many
                         trees are queued as the engine holds, `ib` with `rounds`
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from figures import show

from ibtree.messages import CacheState, Prompt
from ibtree.tree import Finish, SamplingOptions, Tree, TreeOptions
from ibtree.wire.messages import prompt_from_bytes, prompt_to_proto
from ibtree.wire.trees import tree_to_bytes
from server_ext.cache.client import TreeCache
from server_ext.cache.open_trees import TreeAccount
from server_ext.engine.port import Completion
from server_ext.interpreter import settle
from server_ext.queue.journal import Journal
from server_ext.queue.journal_thread import JournalThread
from server_ext.queue.producer import Producer
from server_ext.rewards.base import Graders
from server_ext.services.channel import grpc_server, keep_message_memory
from server_ext.services.queue import QueueService
from server_ext.services.sampling import SamplingService
from server_ext.trees.forest import Forest
from server_ext.trees.limits import Limits
from server_ext.trees.text import Tokenizer

OUT = Path(__file__).parent / "out" / "loop.json"
RUNS = 3
SUBMITTED, PROMPT_TOKENS = 10_000, 400


class NoCache(TreeCache):
    """A radix cache that holds everything."""

    def __init__(self) -> None:
        super().__init__(lambda **_: None, ranks=1)

    async def close(self, name: str) -> TreeAccount:
        self.drop(name)
        return TreeAccount()

    async def state(self) -> CacheState:
        return CacheState()


class RecordedEngine:
    """Gives each request a piece of a recorded text after `seconds` for a whole trajectory."""

    context_tokens, dtype = 262_144, "BF16"

    def __init__(self, recorded: Sequence[int], seconds: float) -> None:
        self.trees = NoCache()
        self._recorded, self._seconds = tuple(recorded), seconds
        self._random = random.Random(0)
        self.generated = 0

    async def generate(
        self,
        rid: str,
        token_ids: Sequence[int],
        sampling: SamplingOptions,
        max_new_tokens: int,
        seed: int = 0,
    ) -> Completion:
        fraction = max_new_tokens / sampling.max_new_tokens
        await asyncio.sleep(self._seconds * fraction * self._random.uniform(0.8, 1.2))
        start = self._random.randrange(len(self._recorded) - max_new_tokens)
        ids = self._recorded[start : start + max_new_tokens]
        self.generated += len(ids)
        length = len(ids)
        return Completion(
            ids, (-0.25,) * length, (1,) * length, Finish.STOP, len(token_ids), len(token_ids) - 1
        )

    def generated_tokens(self, rid: str) -> int:
        return 0

    def abort(self, rid: str) -> None:
        pass


class CoinGrader:
    """Half of the trajectories are right."""

    def check(self, answer: str) -> None:
        pass

    async def grade(self, submission: Any) -> float:
        return float(hash(submission.completion) % 2)


class Lag:
    """How late a task wakes up [ms]."""

    def __init__(self) -> None:
        self.late_ms: list[float] = []

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _watch(self) -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            self.late_ms.append(1000 * (time.perf_counter() - began) - 1.0)

    def quantile(self, fraction: float) -> float:
        ordered = sorted(self.late_ms)
        return ordered[min(int(fraction * len(ordered)), len(ordered) - 1)]


def forest_of(tokenizer: Tokenizer, engine: Any, most: int, defaults: TreeOptions) -> Forest:
    """On any engine: trees are opened until `most` rollouts are in flight."""
    return Forest(
        engine,
        tokenizer,
        Graders({"coin": CoinGrader()}),
        model_id="",
        defaults=defaults,
        default_grader="coin",
        limits=Limits(),
        max_open_trees=0,
        max_calls=64,
        max_waiting_calls=0,
        max_rollouts=most,
        cache_tokens=None,
    )


def at_most(new_tokens: int) -> TreeOptions:
    return TreeOptions(sampling=SamplingOptions(max_new_tokens=new_tokens))


async def under_load(
    tokenizer: Tokenizer, recorded: Sequence[int], folder: Path
) -> dict[str, float]:
    """64 trees of 16 rollouts of 2,048 tokens, 16 of 16 x 16k, and the prompts of one call."""
    keep_message_memory()
    settle()
    engine = RecordedEngine(recorded, 4.0)
    forest = forest_of(tokenizer, engine, 1024, at_most(2048))
    journal = JournalThread(partial(Journal, folder / "journal.sqlite"))
    producer = Producer(
        journal, forest, lambda data: prompt_from_bytes(data, forest.defaults), tree_to_bytes
    )
    sampling = SamplingService(forest, journal, producer, 100_000)
    server = grpc_server(1000, 30.0)
    sampling.add_to(server)
    QueueService(journal, producer, 600.0, lambda: sampling.interactive).add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    options = TreeOptions(
        init_rollouts=8, rounds=5, branch_nodes=2, sampling=forest.defaults.sampling
    )
    long = TreeOptions(
        init_rollouts=8,
        rounds=5,
        branch_nodes=2,
        sampling=SamplingOptions(max_new_tokens=16_384),
    )
    prompt = tuple(recorded[:PROMPT_TOKENS])
    jobs = [forest.check(Prompt(prompt, f"t{i}", options=options)) for i in range(64)]
    jobs += [forest.check(Prompt(prompt, f"l{i}", options=long)) for i in range(16)]
    command = [sys.executable, __file__, "--submit", f"127.0.0.1:{port}"]
    lag = Lag()
    trees: list[Tree] = []
    cpu_s = time.process_time()
    async with lag.watched():
        submit = await asyncio.create_subprocess_exec(*command)
        trees += await asyncio.gather(
            *(forest.grow(job, lambda _: None, time.time()) for job in jobs)
        )
        for tree in trees:  # as the producer does with each
            await forest.off_loop(tree_to_bytes, tree)
        assert await submit.wait() == 0, "the prompts were not taken"
    cpu_s = time.process_time() - cpu_s
    await server.stop(0)
    journal.close()
    return {
        "loop_lag_p99_ms": lag.quantile(0.99),
        "loop_lag_max_ms": lag.quantile(1.0),
        "tokens_per_core_second": engine.generated / cpu_s,
        "steps_per_trajectory": statistics.mean(
            tree.depth_steps(end) for tree in trees for end in tree.end_nodes()
        ),
    }


async def idle() -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, busy in (("idle", 0), ("busy", os.cpu_count() or 1)):
        lag, command = Lag(), [sys.executable, "-c", "while True: pass"]
        processes = [await asyncio.create_subprocess_exec(*command) for _ in range(busy)]
        async with lag.watched():
            await asyncio.sleep(10.0)
        for process in processes:
            process.kill()
            await process.wait()
        figures |= {f"{name}_lag_p99_ms": lag.quantile(0.99), f"{name}_lag_max_ms": lag.quantile(1)}
    return figures


async def in_flight(
    tokenizer: Tokenizer, recorded: Sequence[int], folder: Path
) -> dict[str, float]:
    """The paper's shape; the engine holds 64 rollouts, 256 trees are queued."""
    most = 64
    forest = forest_of(tokenizer, RecordedEngine(recorded, 0.5), most, at_most(512))
    journal = JournalThread(partial(Journal, folder / "queue.sqlite"))
    producer = Producer(
        journal, forest, lambda data: prompt_from_bytes(data, forest.defaults), tree_to_bytes
    )
    prompt = tuple(recorded[:50])
    queued = [prompt_to_proto(Prompt(prompt, f"q{i}")) for i in range(4 * most)]
    rows = [(message.id, message.SerializeToString(deterministic=True)) for message in queued]
    await journal(Journal.submit, rows)
    running = asyncio.create_task(producer.run())
    counts: list[int] = []
    while (await journal(Journal.counts))["queued"] > most // 4:
        counts.append(forest.slots.in_flight)
        await asyncio.sleep(0.01)
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    journal.close()
    return {"in_flight_share": statistics.mean(counts[len(counts) // 10 :]) / most}


def submit(target: str) -> None:
    """The child: all prompts in one call."""
    from ibtree.client import Client

    ids = list(range(100, 100 + PROMPT_TOKENS))
    prompts = [Prompt([*ids[:-1], 1000 + i % 1000], f"p{i}") for i in range(SUBMITTED)]
    with Client(target) as client:
        accepted, known = client.submit_prompts(prompts, timeout_s=300)
    assert (accepted, known) == (SUBMITTED, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    data = os.environ.get("IBTPO_TEST_DATA")
    default = Path(data, "tokenizers/qwen3") if data else None
    parser.add_argument("--tokenizer", type=Path, default=default, metavar="DIR")
    parser.add_argument("--submit", metavar="TARGET", help="only submit prompts there")
    arguments = parser.parse_args()
    if arguments.submit:
        submit(arguments.submit)
        return
    if arguments.tokenizer is None or not arguments.tokenizer.is_dir():
        given = f"no folder {arguments.tokenizer}" if arguments.tokenizer else "no tokenizer"
        sys.exit(
            f"bench-loop: {given}; give one by --tokenizer DIR, or its data by IBTPO_TEST_DATA"
        )
    from server_ext.engine import cpu

    cpu.select()
    tokenizer = Tokenizer(arguments.tokenizer)
    recorded = record(tokenizer)
    runs = []
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as folder:
            figures = asyncio.run(idle()) | asyncio.run(
                under_load(tokenizer, recorded, Path(folder))
            )
            runs.append(figures | asyncio.run(in_flight(tokenizer, recorded, Path(folder))))
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    show("bench-loop", medians, OUT)


def record(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of a long chain of thought: sums in lines and paragraphs."""
    rng = random.Random(1)
    lines = []
    while len(lines) < 12_000:
        a, b = rng.randrange(1000), rng.randrange(1000)
        end = "\n\n" if rng.random() < 0.15 else "\n"
        lines.append(f"So {a} and {b} make {a} + {b} = {a + b}, which we carry on.{end}")
    return tokenizer.encode("".join(lines))


if __name__ == "__main__":
    main()
