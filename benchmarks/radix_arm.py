"""One engine with one radix cache, in a process of its own, that does what bench_radix.py says.

Reads commands as JSON lines on standard input, answers each with one JSON line.
"""

from __future__ import annotations

import server_ext.engine.cpu  # isort: skip  # noqa: F401  first: SGLang's children re-import this module

import asyncio
import dataclasses
import json
import os
import random
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from arm_process import answer_commands
from forest_on import forest_on

MODEL = Path(__file__).parents[1] / "examples" / "arith" / "model"


class HashGrader:
    """Half of the trajectories are right, which ones only a hash knows: for a model that knows
    nothing, so that scores still differ between nodes."""

    def check(self, answer: str) -> None:
        """None is needed."""

    async def grade(self, submission: Any) -> float:
        return float(zlib.crc32(submission.completion.encode()) % 2)


class Arm:
    """An engine, and a forest that grows on it."""

    def __init__(self, model: str, radix_cache: str, arguments: list[str]) -> None:
        from engines import DefaultCacheEngine

        from ibtree.tree.options import SamplingOptions, TreeOptions
        from server_ext.engine.sglang import SglangEngine
        from server_ext.rewards.base import Graders
        from server_ext.rewards.exact import ExactGrader
        from server_ext.trees.text import Tokenizer

        engine = SglangEngine if radix_cache == "ibtree" else DefaultCacheEngine
        self.engine = engine(model, "cpu", "float32", 600.0, arguments)
        self.tokenizer = Tokenizer(Path(model))
        self.graders = Graders({"exact": ExactGrader("####"), "hash": HashGrader()})
        self.defaults = TreeOptions(
            sampling=SamplingOptions(temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=96)
        )
        self.model, self.version = model, 0
        self.branches: list[tuple[int, int]] = []
        self._generate = self.engine.generate
        self.engine.generate = self._watched  # type: ignore[method-assign]

    async def _watched(self, rid: str, *arguments: Any) -> Any:
        completion = await self._generate(rid, *arguments)
        number = rid.rpartition("/")[2]
        if not rid.startswith("background") and number != "prompt" and int(number) >= 4:
            self.branches.append((completion.prefix_tokens - 1, completion.cached_tokens))
        return completion

    async def start(self, admission: bool) -> None:
        from ibtree.tree.options import SamplingOptions

        await self._generate("first-token", [0], SamplingOptions(max_new_tokens=1), 1)
        cache_tokens = (await self.engine.trees.state()).capacity_tokens if admission else None
        self.forest = forest_on(
            self.engine,
            self.tokenizer,
            self.graders,
            self.defaults,
            "hash",
            cache_tokens=cache_tokens,
        )

    async def grow(
        self,
        trees: int,
        seed: int,
        prompt_tokens: int = 0,
        max_new_tokens: int = 96,
        background_tokens: int = 0,
        background_prompt: int = 192,
        background_at_once: int = 8,
    ) -> dict[str, float]:
        """Grows that many trees at once, while unrelated prompts go through the pool until they
        have filled it with `background_tokens` (trees go on being grown until then)."""
        from ibtree.tree.options import changed

        forest, rng = self.forest, random.Random(seed)
        options = changed(self.defaults, max_new_tokens=max_new_tokens)
        self.branches.clear()
        done: list[Any] = []
        pushed, stop = [0], asyncio.Event()
        if not background_tokens:
            stop.set()

        async def grow_one(number: int) -> None:
            while True:
                prompt = self._prompt(rng, prompt_tokens, f"{seed}-{number}-{len(done)}", options)
                job = forest.check(prompt)
                done.append(await forest.grow(job, lambda _: None, time.time()))
                if stop.is_set():
                    return

        async def background(number: int) -> None:
            from ibtree.tree.options import SamplingOptions

            while pushed[0] < background_tokens:
                ids = [rng.randrange(len(self.tokenizer)) for _ in range(background_prompt)]
                rid = f"background-{seed}/{number}-{pushed[0]}"
                pushed[0] += len(ids)
                completion = await self._generate(rid, ids, SamplingOptions(max_new_tokens=2), 2)
                assert completion.finish, "the engine gave up a background request"

        began = time.perf_counter()
        growing = [asyncio.create_task(grow_one(i)) for i in range(trees)]
        flood = [asyncio.create_task(background(i)) for i in range(background_at_once)]
        if background_tokens:
            await asyncio.gather(*flood)
            stop.set()
        await asyncio.gather(*growing)
        seconds = time.perf_counter() - began
        cacheable, cached = (sum(column) for column in zip(*self.branches, strict=True))
        return {
            "seconds": seconds,
            "trees": len(done),
            "generated_tokens": sum(t.ledger.generated_tokens for t in done),
            "unique_tokens": sum(len(t.prompt) + t.unique_tokens for t in done) / len(done),
            "branch_requests": len(self.branches),
            "branch_share": cached / cacheable,
            "refilled_tokens": sum(t.ledger.refilled_tokens for t in done),
            "background_tokens": pushed[0],
        }

    def _prompt(self, rng: random.Random, tokens: int, name: str, options: Any) -> Any:
        from ibtree.messages import Prompt

        if tokens:
            ids = [rng.randrange(1, len(self.tokenizer)) for _ in range(tokens)]
            return Prompt(ids, name, "", "hash", options)
        sys.path.insert(0, str(MODEL.parent))
        from task import make_problem

        problem = make_problem(rng, 10)
        return Prompt(problem.prompt, name, problem.answer, "exact", options)

    async def spread(self, prefixes: int, seed: int) -> dict[str, float]:
        """Audit: warm against cold, beside the engine's own spread over batch sizes, all cold."""
        rng = random.Random(seed)
        warm_cold, batches = [0.0], [0.0]
        for number in range(prefixes):
            prompt = self._prompt(rng, 0, f"spread-{number}", self.defaults)
            ids = self.tokenizer.encode(prompt.content)
            completion = await self._generate(
                f"background/{number}", ids, self.defaults.sampling, 64
            )
            at = rng.randrange(1, len(completion.token_ids))
            prefix, token = [*ids, *completion.token_ids[:at]], completion.token_ids[at]
            cold = []
            for size in (1, 2, 4, 8, 16, 32):
                scores = [self.engine.score(prefix, token, cold=True) for _ in range(size)]
                cold += await asyncio.gather(*scores)
            values = [score.logprob for score in cold]
            batches.append(max(values) - min(values))
            warm = await self.engine.score(prefix, token)
            assert warm.cached_tokens == len(prefix) - 1
            assert all(score.cached_tokens == 0 for score in cold)
            warm_cold.append(abs(warm.logprob - values[0]))
        return {"warm_cold": max(warm_cold), "batch_spread": max(batches)}

    async def updates(self, count: int, trees: int, seed: int) -> dict[str, float]:
        """Updates the weights while trees grow; audits what is cached after each."""
        import torch
        from safetensors.torch import load_file

        from server_ext.cache.audit import Auditor

        forest = self.forest
        auditor = Auditor(self.engine, forest.open_prefixes)
        weights = load_file(Path(self.model) / "model.safetensors")
        rng, stop, grown = random.Random(seed), asyncio.Event(), 0

        async def grow_one(number: int) -> None:
            nonlocal grown
            while not stop.is_set():
                job = forest.check(self._prompt(rng, 0, f"{number}-{grown}", self.defaults))
                await forest.grow(job, lambda _: None, time.time())
                grown += 1

        growing = [asyncio.create_task(grow_one(i)) for i in range(trees)]
        stale, probed, difference, audits, pauses = 0, 0, 0.0, 0, []
        for update in range(count):
            generator = torch.Generator().manual_seed(seed + update)
            moved = [
                (
                    name,
                    t.float() + 0.02 * t.float().std() * torch.randn(t.shape, generator=generator),
                )
                for name, t in weights.items()
                if t.ndim == 2
            ]
            while not (before := [prefix.token_ids for prefix in forest.open_prefixes()]):
                await asyncio.sleep(0.05)  # until a rollout has ended
            async with self.engine.paused():
                began = time.perf_counter()
                self.version += 1
                await self.engine.load(moved, self.version)
                pauses.append(time.perf_counter() - began)
                # nothing was computed since: whatever is found now is of other weights
                probes = await self.engine.trees.probe(before)
                stale += sum(probe.cached_tokens for probe in probes)
                probed += len(probes)
            await asyncio.sleep(0.3)
            audit = await auditor.audit(8)
            stale += audit.stale_tokens
            audits += audit.samples
            difference = max(difference, audit.max_difference)
        stop.set()
        await asyncio.gather(*growing)
        return {
            "cross_version_hits": stale,
            "probed": probed,
            "audits": audits,
            "max_difference": difference,
            "load_ms": 1000 * sorted(pauses)[len(pauses) // 2],
            "trees": grown,
        }

    async def chaos(self, messages: int, grown: int, seed: int) -> dict[str, float]:
        """Trees opened, cancelled and expired at random under load."""
        rng, forest = random.Random(seed), self.forest
        left = iter(range(grown))
        completed = cancelled = 0

        async def grower() -> None:
            nonlocal completed, cancelled
            for number in left:
                job = forest.check(self._prompt(rng, 0, f"chaos-{number}", self.defaults))
                growth = asyncio.create_task(forest.grow(job, lambda _: None, time.time()))
                if rng.random() < 0.3:
                    await asyncio.wait({growth}, timeout=rng.random())
                    growth.cancel()
                await asyncio.wait({growth})
                if growth.cancelled():
                    cancelled += 1
                else:
                    growth.result()  # a tree that failed is no tree that was kept
                    completed += 1

        async def by_messages() -> None:
            names = [f"ghost/{i}" for i in range(messages)]
            for at, name in enumerate(names):
                now_s = time.monotonic()
                # half of them are left to expire, most within a second
                self.engine.trees._send(now_s=now_s, opened={name: now_s + rng.random()})
                if rng.random() < 0.5:
                    self.engine.trees._send(now_s=now_s, closed=[rng.choice(names[: at + 1])])
                if at % 50 == 0:
                    await asyncio.sleep(0.2)

        memory = [_rss_mb()]
        growers = [asyncio.create_task(grower()) for _ in range(16)]
        await asyncio.gather(by_messages(), *growers)
        memory.append(_rss_mb())
        await asyncio.sleep(1.5)
        state = await self.engine.trees.state()
        return {
            "kept": completed,
            "cancelled": cancelled,
            "open_trees": state.open_trees,
            "protected_tokens": state.protected_tokens,
            "rss_mb_before": memory[0],
            "rss_mb_after": memory[1],
        }

    async def state(self) -> dict[str, float]:
        """State of the cache."""
        return dataclasses.asdict(await self.engine.trees.state())


def _rss_mb() -> float:
    """Resident memory of this process and of all it started [MB]."""
    import psutil

    me = psutil.Process()
    return sum(p.memory_info().rss for p in (me, *me.children(recursive=True))) / 1e6


async def main() -> None:
    settings = json.loads(sys.argv[1])
    os.environ["OMP_NUM_THREADS"] = str(settings.get("threads", 1))
    await answer_commands(
        lambda: Arm(settings["model"], settings["radix_cache"], settings["arguments"]),
        lambda arm: arm.start(settings["admission"]),
    )


if __name__ == "__main__":
    asyncio.run(main())
