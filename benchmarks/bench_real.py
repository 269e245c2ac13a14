"""`make bench-real MODEL=DIR`: strategies on GSM8K with a real instruct model (paper, Table 3).

Every problem is sampled with each strategy, side by side; what one tree gives is kept in
benchmarks/out/real/, so that a benchmark that was stopped goes on. Intervals are over problems, and
of differences paired by problem. PROBLEMS, COUNT and STRATEGIES in the environment say which
problems (default: GSM8K's test part, from the Hub), how many of them and which rows.
"""

from __future__ import annotations

import server_ext.engine.cpu  # isort: skip  # noqa: F401  first: SGLang's children re-import this module

import asyncio
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from figures import show as show_figures
from forest_on import forest_on
from strategies import PAPER, Columns, Rows, Setting, figures_of, mean_and_interval, show

HERE = Path(__file__).parent
OUT = HERE / "out" / "real.json"
GSM8K = "hf:openai/gsm8k:main:test"
SETTINGS = {
    setting.name.replace(" ", "-"): setting
    for setting in (
        Setting("independent", (8, 1, 1, 1)),
        Setting("ib", PAPER),
        Setting("random", PAPER),
        Setting("entropy", PAPER),
        Setting("ib_budget", PAPER),
        Setting("independent", (12, 1, 1, 1)),
    )
}
SAMPLING = {"temperature": 0.7, "top_p": 0.95, "top_k": 20, "max_new_tokens": 256}
SYSTEM = (HERE.parent / "examples" / "gsm8k" / "system_prompt.txt").read_text().strip()
ROLLOUTS = 64
"""In flight at most: as many as a decode step of this model takes without getting much longer."""
TREES = 32
"""Open at once: a tree in `rounds` has few rollouts in flight."""


class Finished:
    """The figures of each tree by problem and setting, in a JSON lines file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._rows: dict[tuple[str, str], dict[str, float]] = {}
        for line in path.read_text().splitlines(keepends=True) if path.is_file() else []:
            if line.endswith("\n"):  # else it was cut off by a kill
                row = json.loads(line)
                self._rows[row["problem"], row["setting"]] = row["figures"]

    def __contains__(self, job: tuple[str, str]) -> bool:
        return job in self._rows

    def add(self, problem: str, setting: str, figures: dict[str, float]) -> None:
        self._rows[problem, setting] = figures
        row = {"problem": problem, "setting": setting, "figures": figures}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def of(self, setting: str, name: str) -> dict[str, float]:
        """A figure of each problem with this setting."""
        return {p: figures[name] for (p, s), figures in self._rows.items() if s == setting}

    def columns(self, setting: str) -> Columns:
        rows = [figures for (_, s), figures in self._rows.items() if s == setting]
        return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


class Bench:
    """The model's engine, and a forest on it."""

    def __init__(self, model: Path) -> None:
        from ibtree.tree.options import SamplingOptions, TreeOptions
        from server_ext.engine.sglang import SglangEngine
        from server_ext.rewards.base import Graders
        from server_ext.rewards.math import MathGrader
        from server_ext.rewards.pool import GradingPool
        from server_ext.trees.text import Tokenizer

        self.engine = SglangEngine(
            str(model), "cpu", "bfloat16", 600.0, ["--max-total-tokens=65536"]
        )
        self.grading = GradingPool(1, 10.0)
        self.defaults = TreeOptions(
            sampling=SamplingOptions(**SAMPLING),
            step_rule="auto",
        )
        self.forest = forest_on(
            self.engine,
            Tokenizer(model),
            Graders({"math": MathGrader(self.grading, "####")}),
            self.defaults,
            "math",
            at_once=TREES,
            max_rollouts=ROLLOUTS,
        )

    async def sweep(self, problems: list[Any], settings: list[str], finished: Finished) -> None:
        """Grows what is not finished yet: a problem's trees of all settings next to one another."""
        jobs = [
            (problem, name)
            for problem in problems
            for name in settings
            if (key_of(problem), name) not in finished
        ]
        queue, began, done = iter(jobs), time.monotonic(), 0

        async def work(queue: Iterator[tuple[Any, str]]) -> None:
            nonlocal done
            for problem, name in queue:
                finished.add(key_of(problem), name, figures_of(await self._grow(problem, name)))
                done += 1
                minutes = (time.monotonic() - began) / 60
                left = minutes / done * (len(jobs) - done)
                print(
                    f"  {done} of {len(jobs)} trees, {minutes:.1f} min, about {left:.0f} min left",
                    end="\r" if sys.stdout.isatty() else "\n",
                    flush=True,
                )

        await asyncio.gather(*(work(queue) for _ in range(TREES)))

    async def _grow(self, problem: Any, name: str) -> Any:
        from ibtree.messages import Prompt

        options = SETTINGS[name].options(self.defaults)
        prompt = Prompt(problem.prompt, "", problem.answer, "math", options)
        async with self.forest.permits:
            return await self.forest.grow(self.forest.check(prompt), lambda _: None, time.time())


def key_of(problem: Any) -> str:
    text = problem.prompt.messages[-1].content
    return hashlib.sha256(f"{text}\0{problem.answer}".encode()).hexdigest()[:16]


def read_problems(source: str, count: int) -> list[Any]:
    """So many problems of the source, the same ones each time, with the demo's system prompt."""
    from ibtree.data.questions import Reading, read_questions

    questions = read_questions(source, Reading(system_prompt=SYSTEM))
    return random.Random(0).sample(questions, min(count, len(questions)))


def report(finished: Finished, settings: list[str]) -> None:
    """The table of what is finished, and the figures that compare `ib-12` with `independent-8`."""
    from ibtree.evaluation.accuracy import paired_gain

    rows: Rows = {}
    for name in settings:
        columns = finished.columns(name)
        rows[name] = {key: mean_and_interval(values) for key, values in columns.items()}
    show(rows)
    figures: dict[str, float] = {}
    for name in settings:
        figures |= {f"{key}_{name}": rows[name][key][0] for key in ("eff_rate", "avg_rate")}
        if name == "independent-8":
            continue
        for key in ("avg_rate", "eff_rate", "first_rate"):
            gain = paired_gain(finished.of("independent-8", key), finished.of(name, key))
            figures |= {
                f"{key}_gain_{name}": gain.mean,
                f"{key}_gain_low_{name}": gain.low,
                f"{key}_gain_high_{name}": gain.high,
            }
    ib, eight = rows["ib-12"], rows["independent-8"]
    figures |= {
        "real_token_ratio": ib["generated_tokens"][0] / eight["generated_tokens"][0],
        "real_avg_rate_gain": figures["avg_rate_gain_ib-12"],
        "real_avg_rate_gain_low": figures["avg_rate_gain_low_ib-12"],
        "real_problems": float(len(finished.of("ib-12", "avg_rate"))),
    }
    show_figures("GSM8K, real model", figures, OUT)


def main() -> None:
    model = Path(os.environ.get("MODEL", ""))
    if not (model / "config.json").is_file():
        sys.exit("bench-real: needs MODEL=DIR, the Hugging Face folder of an instruct model")
    settings = os.environ.get("STRATEGIES", "independent-8,ib-12").split(",")
    if unknown := sorted(set(settings) - set(SETTINGS)):
        sys.exit(f"bench-real: no strategy {unknown[0]}; {', '.join(SETTINGS)}")
    if not {"independent-8", "ib-12"} <= set(settings):
        sys.exit("bench-real: STRATEGIES must hold independent-8 and ib-12, which are compared")
    source, count = os.environ.get("PROBLEMS", GSM8K), int(os.environ.get("COUNT", "128"))
    problems = read_problems(source, count)
    setting = hashlib.sha256(json.dumps([SYSTEM, SAMPLING]).encode()).hexdigest()[:8]
    name = f"{model.resolve().name}-{setting}.jsonl"
    finished = Finished(OUT.with_suffix("") / name)
    asyncio.run(grow_all(model, problems, settings, finished))
    report(finished, settings)


async def grow_all(
    model: Path, problems: list[Any], settings: list[str], finished: Finished
) -> None:
    bench = Bench(model)
    try:
        await bench.sweep(problems, settings, finished)
    finally:
        bench.engine.shutdown()
        bench.grading.close()


if __name__ == "__main__":
    main()
