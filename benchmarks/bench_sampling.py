"""`make bench-sampling`: every strategy on the same problems, a table like the paper's Table 3.

Settings take turns problem set by problem set, on one engine; a seed is one set of problems. Parts:
table, wall (wall times of the schedules); without a name both. `--problems`, `--seeds` and
`--pairs` make it shorter.
"""

from __future__ import annotations

import server_ext.engine.cpu  # isort: skip  # noqa: F401  first: SGLang's children re-import this module

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forest_on import forest_on
from strategies import PAPER, Columns, Rows, Setting, figures_of, mean_and_interval, show

HERE = Path(__file__).parent
OUT = HERE / "out" / "sampling.json"
ARITH = HERE.parent / "examples" / "arith"
MODEL = ARITH / "model"
TASKS = {"easy": 6, "chains": 10}
"""Terms of each task's problems."""
PARTS = ["table", "wall"]
SETTINGS = [
    Setting("independent", (8, 1, 1, 1)),
    Setting("independent", (12, 1, 1, 1)),
    Setting("random", PAPER),
    Setting("fixed_width", PAPER),
    Setting("entropy", PAPER),
    Setting("ib", PAPER),
    Setting("ib", PAPER, "eager"),
    Setting("ib_budget", PAPER),
    Setting("ib_budget", (4, 13, 1, 1)),
]


def columns_of(trees: list[Any], seconds: float) -> Columns:
    """Figures of one set of problems grown with one setting; its wall time is divided evenly."""
    rows = [figures_of(tree) | {"seconds": seconds / len(trees)} for tree in trees]
    return {name: [row[name] for row in rows] for name in rows[0]}


class Bench:
    """An engine, and a forest on it."""

    def __init__(self, at_once: int) -> None:
        from ibtree.tree.options import SamplingOptions, TreeOptions
        from server_ext.engine.sglang import SglangEngine
        from server_ext.rewards.base import Graders
        from server_ext.rewards.exact import ExactGrader
        from server_ext.trees.text import Tokenizer

        self.engine = SglangEngine(str(MODEL), "cpu", "float32", 600.0, [])
        tokenizer = Tokenizer(MODEL)
        sampling = SamplingOptions(temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=128)
        self.options = TreeOptions(sampling=sampling)
        graders = Graders({"exact": ExactGrader("####")})
        self.forest = forest_on(
            self.engine, tokenizer, graders, self.options, "exact", at_once=at_once
        )
        self.at_once = at_once

    async def grow(self, problems: list[Any], setting: Setting) -> Columns:
        from engines import flush

        from ibtree.messages import Prompt

        options = setting.options(self.options)

        async def grow_one(problem: Any) -> Any:
            job = self.forest.check(Prompt(problem.prompt, "", problem.answer, "exact", options))
            async with self.forest.permits:
                return await self.forest.grow(job, lambda _: None, time.time())

        await flush(self.engine)  # what one setting computed must not help the next
        began = time.perf_counter()
        trees = await asyncio.gather(*(grow_one(problem) for problem in problems))
        return columns_of(trees, time.perf_counter() - began)

    async def table(self, problems: Callable[..., list[Any]], count: int, seeds: int) -> Rows:
        """Every setting on the same problems, set by set."""
        columns_by_row: dict[str, Columns] = {}
        for seed in range(seeds):
            for task, terms in TASKS.items():
                chosen = problems(count, terms, seed)
                for setting in SETTINGS:
                    row = columns_by_row.setdefault(f"{task} {setting.name}", {})
                    for name, values in (await self.grow(chosen, setting)).items():
                        row.setdefault(name, []).extend(values)
        return {
            row: {name: mean_and_interval(values) for name, values in columns.items()}
            for row, columns in columns_by_row.items()
        }

    async def wall(self, problems: Callable[..., list[Any]], pairs: int) -> dict[str, float]:
        """Wall times of (4, 9, 1, 1) trees, medians over pairs that take turns at being first:
        `eager` relative to `independent` 8, and of single trees relative to `rounds`."""
        independent, rounds = Setting("independent", (8, 1, 1, 1)), Setting("ib", PAPER)
        eager, budget = Setting("ib", PAPER, "eager"), Setting("ib_budget", PAPER, "eager")

        async def took(
            sets: list[list[Any]], settings: list[Setting], pair: int
        ) -> dict[Setting, float]:
            seconds_of, first = {}, pair % len(settings)
            for setting in settings[first:] + settings[:first]:
                columns = [await self.grow(chosen, setting) for chosen in sets]
                seconds_of[setting] = sum(sum(grown["seconds"]) for grown in columns)
            return seconds_of

        figures: dict[str, float] = {}
        for trees in (64, 32):
            sets = [problems(trees, TASKS["chains"], 1000 * trees + pair) for pair in range(pairs)]
            settings = [independent, eager, budget]
            times = [
                await took([problem_set], settings, pair) for pair, problem_set in enumerate(sets)
            ]
            for setting, name in ((eager, ""), (budget, "_ib_budget")):
                ratios = [seconds_of[setting] / seconds_of[independent] for seconds_of in times]
                figures[f"wall_ratio_{trees}{name}"] = statistics.median(ratios)
        ratios = []
        for pair in range(pairs):
            singles = [[problem] for problem in problems(8, TASKS["chains"], pair)]
            seconds_of = await took(singles, [rounds, eager], pair)
            ratios.append(seconds_of[eager] / seconds_of[rounds])
        figures["single_tree_ratio"] = statistics.median(ratios)
        return figures


def keys(rows: Rows) -> dict[str, float]:
    """The figures by name, of the 10-term chains."""
    eight, twelve = rows["chains independent 8"], rows["chains independent 12"]
    ib, budget = rows["chains ib 12"], rows["chains ib_budget 12"]

    def per_token(row: dict[str, tuple[float, float]]) -> float:
        return row["G"][0] / row["generated_tokens"][0]

    return {
        "token_ratio": ib["generated_tokens"][0] / eight["generated_tokens"][0],
        "avg_rate_ib": ib["avg_rate"][0],
        "avg_rate_independent_8": eight["avg_rate"][0],
        "eff_rate_ib": ib["eff_rate"][0],
        "eff_rate_independent_8": eight["eff_rate"][0],
        "eff_rate_independent_12": twelve["eff_rate"][0],
        "trajectories_per_token_ib_budget": per_token(budget) / per_token(eight),
        "eff_rate_ib_budget": budget["eff_rate"][0],
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=PARTS, help="table, wall")
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=9)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(ARITH))
    from task import problems

    from ibtree.tree.options import SamplingOptions

    figures: dict[str, float] = json.loads(OUT.read_text()) if OUT.is_file() else {}
    bench = Bench(arguments.at_once)
    try:
        await bench.engine.generate("first-token", [0], SamplingOptions(max_new_tokens=1), 1)
        if "table" in arguments.parts:
            rows = await bench.table(problems, arguments.problems, arguments.seeds)
            show(rows)
            figures |= keys(rows)
        if "wall" in arguments.parts:
            figures |= await bench.wall(problems, arguments.pairs)
    finally:
        bench.engine.shutdown()
    report(figures)


def report(figures: dict[str, float]) -> None:
    from rich.console import Console

    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(figures, indent=2) + "\n")
    Console().print(figures)


if __name__ == "__main__":
    asyncio.run(main())
