"""`make bench-sampling`: every strategy on the same problems, a table like the paper's Table 3.

Settings are interleaved problem set by problem set, on one engine; a seed is one set of problems.
`--problems` and `--seeds` make it shorter.
"""

from __future__ import annotations

import server_ext.cpu  # isort: skip  # noqa: F401  first: SGLang's children re-import this module

import argparse
import asyncio
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from forest_on import forest_on

HERE = Path(__file__).parent
OUT = HERE / "out" / "sampling.json"
ARITH = HERE.parent / "examples" / "arith"
MODEL = ARITH / "model"
TASKS = {"easy": 6, "chains": 10}
"""Terms of each task's problems."""
T_975 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t at 97.5 % by number of seeds."""


class Setting(NamedTuple):
    """A row of the table."""

    strategy: str
    shape: tuple[int, int, int, int]
    schedule: str = "rounds"

    @property
    def name(self) -> str:
        b0, rounds, k, b = self.shape
        g = b0 + (rounds - 1) * k * b
        schedule = "" if self.schedule == "rounds" else f", {self.schedule}"
        return f"{self.strategy} {g}{schedule}"


PAPER = (4, 9, 1, 1)
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


def figures_of(trees: list[Any], seconds: float) -> dict[str, float]:
    """Of one set of problems grown with one setting."""
    ledgers = [tree.ledger for tree in trees]
    n = len(trees)
    return {
        "G": statistics.mean(tree.trajectories for tree in trees),
        "eff_rate": sum(float(tree.rewards().std()) > 0 for tree in trees) / n,
        "avg_rate": statistics.mean(float(tree.rewards().mean()) for tree in trees),
        "first_rate": statistics.mean(tree.first_round_reward for tree in trees),
        "generated_tokens": sum(one.generated_tokens for one in ledgers) / n,
        "unique_tokens": sum(tree.unique_tokens for tree in trees) / n,
        "cached_share": sum(x.cached_tokens for x in ledgers)
        / sum(x.prefix_tokens for x in ledgers),
        "seconds": seconds,
    }


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half its 95 % interval over seeds."""
    if len(values) < 2:
        return values[0], math.nan
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), T_975.get(len(values), 1.96) * spread


class Bench:
    """An engine, and a forest on it."""

    def __init__(self, at_once: int) -> None:
        from ibtree.options import SamplingOptions, TreeOptions
        from server_ext.engine import SglangEngine
        from server_ext.rewards.base import Graders
        from server_ext.rewards.exact import ExactGrader
        from server_ext.text import Tokenizer

        self.engine = SglangEngine(str(MODEL), "cpu", "float32", 600.0, [])
        tokenizer = Tokenizer(MODEL)
        sampling = SamplingOptions(temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=128)
        self.options = TreeOptions(sampling=sampling)
        graders = Graders({"exact": ExactGrader("####")})
        self.forest = forest_on(
            self.engine, tokenizer, graders, self.options, "exact", at_once=at_once
        )
        self.at_once = at_once

    async def grow(self, problems: list[Any], setting: Setting) -> dict[str, float]:
        from ibtree.messages import Prompt
        from ibtree.options import changed

        b0, rounds, k, b = setting.shape
        options = changed(
            self.options,
            strategy=setting.strategy,
            schedule=setting.schedule,
            init_rollouts=b0,
            rounds=rounds,
            branch_nodes=k,
            branch_rollouts=b,
        )

        async def one(problem: Any) -> Any:
            job = self.forest.check(Prompt(problem.prompt, "", problem.answer, "exact", options))
            async with self.forest.places:
                return await self.forest.grow(job, lambda _: None, time.time())

        began = time.perf_counter()
        trees = await asyncio.gather(*(one(problem) for problem in problems))
        return figures_of(trees, time.perf_counter() - began)

    async def wall(self, problems: list[Any], repeats: int) -> dict[str, float]:
        """Wall time of eager (4, 9, 1, 1) relative to independent 8, and to rounds for one tree."""
        eager, rounds = Setting("ib", PAPER, "eager"), Setting("ib", PAPER)
        independent = Setting("independent", (8, 1, 1, 1))
        figures = {}
        for trees in (64, 32):
            ratios = []
            for at in range(repeats):
                chosen = problems[at * trees :][:trees]
                ours = await self.grow(chosen, eager)
                theirs = await self.grow(chosen, independent)
                ratios.append(ours["seconds"] / theirs["seconds"])
            figures[f"wall_ratio_{trees}"] = statistics.median(ratios)
        ratios = []
        for problem in problems[: 3 * repeats]:
            ours = await self.grow([problem], eager)
            paper = await self.grow([problem], rounds)
            ratios.append(ours["seconds"] / paper["seconds"])
        figures["single_tree_ratio"] = statistics.median(ratios)
        return figures


def keys(table: dict[str, dict[str, tuple[float, float]]]) -> dict[str, float]:
    """The figures by name, of the 10-term chains."""
    eight, twelve = table["chains independent 8"], table["chains independent 12"]
    ib, budget = table["chains ib 12"], table["chains ib_budget 12"]

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
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=64)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(ARITH))
    from task import problems

    from ibtree.options import SamplingOptions

    found: dict[str, dict[str, list[float]]] = {}
    bench = Bench(arguments.at_once)
    try:
        await bench.engine.generate("first-token", [0], SamplingOptions(max_new_tokens=1), 1)
        for seed in range(arguments.seeds):
            for task, terms in TASKS.items():
                chosen = problems(arguments.problems, terms, seed)
                for setting in SETTINGS:
                    row = found.setdefault(f"{task} {setting.name}", {})
                    for name, value in (await bench.grow(chosen, setting)).items():
                        row.setdefault(name, []).append(value)
        wall = await bench.wall(problems(64 * 5, TASKS["chains"], 99), 5)
    finally:
        bench.engine.shutdown()
    table = {
        row: {name: mean_and_interval(values) for name, values in columns.items()}
        for row, columns in found.items()
    }
    report(table, keys(table) | wall)


def report(table: dict[str, dict[str, tuple[float, float]]], figures: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="per tree; mean ± half the 95 % interval over seeds")
    columns = list(next(iter(table.values())))
    shown.add_column("task and strategy")
    for column in columns:
        shown.add_column(column, justify="right")
    for row, values in table.items():
        shown.add_row(row, *(f"{m:.4g} ± {h:.2g}" for m, h in values.values()))
    Console(width=200).print(shown)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(figures, indent=2) + "\n")
    Console().print(figures)


if __name__ == "__main__":
    asyncio.run(main())
