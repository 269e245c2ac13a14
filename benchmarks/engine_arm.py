"""One engine in a process of its own, that does what bench_engine.py says.

`{"stock": true}` in its settings: SGLang's own attention and sampler for a CPU, and a prefill pass
for every request. Reads commands as JSON lines on standard input, answers each with one JSON line.
"""

from __future__ import annotations

import server_ext.engine.cpu  # isort: skip  first: SGLang's children re-import this module

import asyncio
import json
import os
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import scheduler_clock
from arm_process import answer_commands

STOCK = "IBTPO_BENCH_STOCK"
SAMPLING = {"temperature": 0.7, "top_p": 0.95, "top_k": 20}

if os.environ.get(STOCK):  # in the scheduler too, whose process re-imports this module
    import server_ext.cache.joining
    import server_ext.plugin

    server_ext.cache.joining._can_join = lambda *_: False
    server_ext.plugin.register_sampler = lambda: None


scheduler_clock.install()


class Span(NamedTuple):
    """A request: when it was in the engine [s], and the tokens that it generated."""

    began: float
    ended: float
    prefix_tokens: int
    tokens: int


class Arm:
    """An engine, and what it has done."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from server_ext.engine.sglang import SglangEngine
        from server_ext.trees.text import Tokenizer

        arguments = [*settings["arguments"]]
        if settings["stock"]:
            arguments += ["--attention-backend=torch_native"]
        self.engine = SglangEngine(settings["model"], "cpu", settings["dtype"], 600.0, arguments)
        self.tokenizer = Tokenizer(Path(settings["model"]))
        self.clock = scheduler_clock.Clock(Path(os.environ[scheduler_clock.VARIABLE]))
        self.arith = "arith" in settings["model"]
        self.spans: list[Span] = []
        self._generate = self.engine.generate
        self.engine.generate = self._watched  # type: ignore[method-assign]

    async def _watched(self, rid: str, prefix: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        completion = await self._generate(rid, prefix, *arguments)
        self.spans.append(Span(began, time.perf_counter(), len(prefix), len(completion.token_ids)))
        return completion

    async def start(self) -> None:
        from ibtree.tree.options import SamplingOptions

        await self._generate("first-token", [0], SamplingOptions(max_new_tokens=1), 1)

    async def decode(
        self, rollouts: int, prompt_tokens: int, new_tokens: int, seed: int, runs: int = 1
    ) -> dict[str, Any]:
        """Tokens a second of so many rollouts in flight, whose prompts are in the cache."""
        rng = random.Random(seed)
        prompts = [self._ids(rng, prompt_tokens) for _ in range(rollouts)]
        await self._all(prompts, 1)
        seconds = []
        for _ in range(runs):
            began = time.perf_counter()
            await self._all(prompts, new_tokens)
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds, "tokens": rollouts * new_tokens}

    def _question(self, rng: random.Random) -> Any:
        """A problem that the model can say something about."""
        if not self.arith:
            return word_problem(rng)
        sys.path.insert(0, str(Path(__file__).parents[1] / "examples/arith"))
        from task import make_problem

        return make_problem(rng, 10).prompt

    def _ids(self, rng: random.Random, tokens: int) -> list[int]:
        return [rng.randrange(1, min(len(self.tokenizer), 50_000)) for _ in range(tokens)]

    async def _all(self, prompts: list[list[int]], new_tokens: int) -> None:
        await asyncio.gather(*(self._plain(ids, new_tokens) for ids in prompts))

    async def _plain(self, ids: list[int], new_tokens: int) -> None:
        """A request of exactly so many tokens, straight to SGLang."""
        parameters = {"max_new_tokens": new_tokens, "ignore_eos": True, **SAMPLING}
        began = time.perf_counter()
        await self.engine._engine.async_generate(
            input_ids=ids, sampling_params=parameters, return_logprob=True
        )
        self.spans.append(Span(began, time.perf_counter(), len(ids), new_tokens))

    async def grow(
        self, strategy: str, limit: int, trees: int, new_tokens: int, seed: int
    ) -> dict[str, Any]:
        """Grows trees from the queue with at most `limit` rollouts in flight.

        `ib`: (4, 9, 1, 1) with `rounds`; `independent`: 8. Returns the seconds per tree between the
        moment when so many were first in flight and the start of the last queued prompt, the
        generated tokens a second between them, and the requests' lengths, for `replay`.
        """
        from bench_loop import forest_of
        from engines import flush

        from ibtree.messages import Prompt
        from ibtree.tree.options import SamplingOptions, TreeOptions
        from ibtree.wire.messages import prompt_from_bytes, prompt_to_proto
        from ibtree.wire.trees import tree_to_bytes
        from server_ext.queue.journal import Journal
        from server_ext.queue.journal_thread import JournalThread
        from server_ext.queue.producer import Producer

        sampling = SamplingOptions(max_new_tokens=new_tokens, **SAMPLING)
        first, rounds = (4, 9) if strategy == "ib" else (8, 1)
        options = TreeOptions(
            sampling=sampling,
            strategy=strategy,
            step_rule="text" if self.arith else "auto",
            init_rollouts=first,
            rounds=rounds,
        )
        forest = forest_of(self.tokenizer, self.engine, limit, options)
        await flush(self.engine)  # what one strategy computed must not help the next
        self.spans.clear()
        passes = await self.engine.trees.state()
        scheduler = self.clock.read()
        rng = random.Random(seed)
        with tempfile.TemporaryDirectory() as folder:
            journal = JournalThread(partial(Journal, Path(folder, "journal.sqlite")))
            producer = Producer(
                journal, forest, lambda data: prompt_from_bytes(data, options), tree_to_bytes
            )
            queued = [
                prompt_to_proto(Prompt(self._question(rng), f"{strategy}-{seed}-{i}"))
                for i in range(trees)
            ]
            rows = [(m.id, m.SerializeToString(deterministic=True)) for m in queued]
            await journal(Journal.submit, rows)
            running = asyncio.create_task(producer.run())
            full = last = 0.0
            grown_at_full = 0
            while True:
                counts = await journal(Journal.counts)
                now = time.perf_counter()
                if not full and forest.slots.in_flight >= limit:
                    full, grown_at_full = now, trees - counts["queued"]
                if not last and not counts["queued"]:
                    last = now
                if counts["graded"] + counts["dead"] == trees:
                    break
                await asyncio.sleep(0.02)
            running.cancel()
            journal.close()
        after = await self.engine.trees.state()
        worked = {name: value - scheduler.get(name, 0) for name, value in self.clock.read().items()}
        spans = [span for span in self.spans if span.ended > full and span.began < last]
        tokens = sum(
            span.tokens
            * (min(span.ended, last) - max(span.began, full))
            / (span.ended - span.began)
            for span in spans
        )
        return {
            "seconds_per_tree": (last - full) / (trees - grown_at_full),
            "tokens_per_second": tokens / (last - full),
            "tokens": sum(span.tokens for span in self.spans),
            "tail_seconds": time.perf_counter() - last,
            "requests": len(self.spans),
            "lengths": [[span.prefix_tokens, span.tokens] for span in self.spans],
            "prefill_passes": after.prefill_passes - passes.prefill_passes,
            "joined_requests": after.joined_requests - passes.joined_requests,
            "dead": counts["dead"],
            "scheduler": worked,
        }

    async def replay(self, lengths: list[list[int]], limit: int, seed: int) -> dict[str, Any]:
        """Plain requests of these lengths, `limit` in flight, their prompts in the cache: tokens a
        second until the last of them starts."""
        rng = random.Random(seed)
        shared = {n: self._ids(rng, n) for n, _ in lengths}
        await self._all(list(shared.values()), 1)
        self.spans.clear()
        left = iter(lengths)
        started = [0.0]

        async def one_after_the_other() -> None:
            for prefix, tokens in left:
                started.append(time.perf_counter())
                await self._plain(shared[prefix], tokens)

        began = time.perf_counter()
        await asyncio.gather(*(one_after_the_other() for _ in range(limit)))
        last = max(started)
        tokens = sum(
            s.tokens * (min(s.ended, last) - s.began) / (s.ended - s.began) for s in self.spans
        )
        return {"tokens_per_second": tokens / (last - began)}


def word_problem(rng: random.Random) -> Any:
    """A chat with numbers of its own."""
    from ibtree.messages import Chat, ChatMessage

    a, b, c = (rng.randrange(2, 90) for _ in range(3))
    name = rng.choice(["Ann", "Bob", "Carla", "Dan", "Eve", "Finn", "Gina", "Hugo"])
    return Chat(
        (
            ChatMessage(
                "user",
                f"{name} has {a} boxes with {b} apples each and gives {c} apples away. How many "
                "apples are left? Explain each step in a line of its own.",
            ),
        )
    )


async def main() -> None:
    await answer_commands(lambda: Arm(json.loads(sys.argv[1])), Arm.start)


if __name__ == "__main__":
    asyncio.run(main())
