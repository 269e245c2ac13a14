"""`make bench-learning`: ways to grow and to weigh, trained at one budget of generated tokens.

One server for all; each run is a learner of its own that starts from the untrained model (it pushes
it first). The sparse task rewards a derivation only if every step is right: a remote grader in this
process says so (of guessed digits at the end one in ten would be right). Accuracy while learning is
that of the first rollouts of each step's trees, which no branching inflates; at the end 256
held-out problems are asked. Writes a table and, with the curves, benchmarks/out/learning.html.
`--tasks`, `--ways`, `--seeds` and `--tokens` make it shorter; runs that are there already, with the
same settings, are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from ibtree.wire.v1 import reward_pb2, reward_pb2_grpc

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "arith"))

import task
from processes import Ended, learner_command, running, server_command, wait_until_serving
from report import CSS, Series, chart

OUT = Path(__file__).parent / "out" / "learning.json"
RUNS, FIGURE = OUT.with_suffix(""), OUT.with_suffix(".html")
HELD_OUT, PER_STEP = 256, 16


class Task(NamedTuple):
    """`longest`: most new tokens of a trajectory; `tokens`: the budget of a run."""

    terms: int
    longest: int
    grader: str
    tokens: int


TASKS = {
    "easy": Task(6, 96, "exact", 100_000),
    "sparse": Task(10, 128, "remote", 120_000),
}
TREE = ["--init-rollouts=4", "--rounds=9"]
WAYS = {
    "ib_tpo": ["--strategy=ib", *TREE],
    "grpo": ["--strategy=independent", "--init-rollouts=8", "--rounds=1", "--local-weight=0"],
    "ib_tree_lambda_0": ["--strategy=ib", "--local-weight=0", *TREE],
    "random_tree": ["--strategy=random", *TREE],
    "ib_budget": ["--strategy=ib_budget", *TREE],
}
"""The rows of the paper's Table 2, and ours."""
Rows = list[dict[str, Any]]
"""Rows of a run's metrics."""
T_975 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t at 97.5 % by number of seeds."""


class EveryStep(reward_pb2_grpc.RewardServiceServicer):
    """1 for a derivation that is right from the first step to the last."""

    def Grade(self, request: reward_pb2.GradeRequest, context: Any) -> reward_pb2.GradeResponse:
        rewards = [
            float(trajectory.completion.strip() == right(trajectory.prompt))
            for trajectory in request.trajectories
        ]
        return reward_pb2.GradeResponse(rewards=rewards)


def right(prompt: str) -> str:
    return task.solution(task.Problem(prompt, ""), random.Random())


@contextmanager
def grading() -> Iterator[str]:
    """The address of the remote grader."""
    server = grpc.server(ThreadPoolExecutor(2))
    reward_pb2_grpc.add_RewardServiceServicer_to_server(EveryStep(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


@contextmanager
def serving(grader: str) -> Iterator[str]:
    """The address of the server, which starts with the untrained model."""
    line = server_command(RUNS / "server", f"--reward-address={grader}")
    with running(line, RUNS / "server.log") as process:
        yield wait_until_serving(process).grpc


def learn(target: str, way: str, name: str, seed: int, tokens: int) -> Rows:
    folder, chosen = RUNS / f"{name}-{way}-{seed}-{tokens}", TASKS[name]
    line = learner_command(
        target,
        folder / "train.jsonl",
        folder,
        f"--eval-prompts={folder / 'held_out.jsonl'}",
        *("--threads=1", f"--seed={seed}", "--lr=3e-4"),
        *(f"--grader={chosen.grader}", f"--prompts-per-step={PER_STEP}", "--steps=1000"),
        *("--checkpoint-every-steps=1000", f"--max-tokens={tokens}"),
        *(f"--max-new-tokens={chosen.longest}", *WAYS[way]),
    )
    settings = "\n".join(word for word in line if not word.startswith("--server="))
    done = folder / "settings"
    if not done.is_file() or done.read_text() != settings:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        train, held_out = task.split(4096, HELD_OUT, chosen.terms, seed)
        task.write_jsonl(folder / "train.jsonl", train)
        task.write_jsonl(folder / "held_out.jsonl", held_out)
        with running(line, folder / "log") as process:
            if process.popen.wait():
                raise Ended(f"{way}: the learner's last words:\n{process.last_words()}")
        done.write_text(settings)
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]


def figures_of(rows: Rows) -> dict[str, float]:
    """Accuracy at the end, and its mean over the tokens generated on the way."""
    steps = [row for row in rows if row["kind"] == "step"]
    evals = [row for row in rows if row["kind"] == "eval"]
    spent = [row["generated_tokens"] for row in steps]
    seen = [row["first_round_reward"] for row in steps]
    return {
        "before": evals[0]["accuracy"],
        "final": evals[-1]["accuracy"],
        "area": sum(a * t for a, t in zip(seen, spent, strict=True)) / sum(spent),
        "eff_rate": statistics.mean(row["eff_rate"] for row in steps),
        "steps": len(steps),
    }


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half its 95 % interval over seeds."""
    if len(values) < 2:
        return values[0], math.nan
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), T_975.get(len(values), 1.96) * spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tokens", type=int, help="generated in each run, instead of the task's")
    arguments = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    runs_of: dict[tuple[str, str], list[Rows]] = {}
    with grading() as grader, serving(grader) as target:
        for seed in range(arguments.seeds):
            for name in arguments.tasks:
                for way in arguments.ways:
                    tokens = arguments.tokens or TASKS[name].tokens
                    rows = learn(target, way, name, seed, tokens)
                    runs_of.setdefault((name, way), []).append(rows)
                    print(name, way, seed, figures_of(rows), flush=True)
    report({key: [figures_of(rows) for rows in runs] for key, runs in runs_of.items()})
    draw(runs_of)


def curve(way: str, runs: list[Rows]) -> Series:
    """Accuracy against generated tokens: means over seeds, step by step, and their intervals."""
    series = Series(way, list(WAYS).index(way), [])
    for rows in zip(*([r for r in run if r["kind"] == "step"] for run in runs), strict=False):
        tokens = statistics.mean(row["tokens"] for row in rows)
        mean, half = mean_and_interval([row["first_round_reward"] for row in rows])
        series.points.append((tokens, mean))
        if len(rows) > 1:
            series.spread.append((tokens, mean - half, mean + half))
    return series


def draw(runs_of: dict[tuple[str, str], list[Rows]]) -> None:
    charts = [
        chart(
            f"{name}: {TASKS[name].terms} terms, accuracy of first rollouts, 95 % interval",
            "generated tokens",
            [curve(way, runs) for (task_name, way), runs in runs_of.items() if task_name == name],
        )
        for name in dict.fromkeys(name for name, _ in runs_of)
    ]
    FIGURE.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>bench-learning</title>'
        f'<style>{CSS}</style><main><div class="charts">{"".join(charts)}</div></main></html>\n'
    )


def report(figures_by_way: dict[tuple[str, str], list[dict[str, float]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    figures: dict[str, float] = {}
    table = Table(title="mean ± half the 95 % interval over seeds")
    for column in ("task", "way", *next(iter(figures_by_way.values()))[0]):
        table.add_column(column, justify="right" if table.columns[1:] else "left")
    for (name, way), runs in figures_by_way.items():
        cells = []
        for figure in runs[0]:
            mean, half = mean_and_interval([run[figure] for run in runs])
            figures[f"{name}_{way}_{figure}"] = mean
            figures[f"{name}_{way}_{figure}_interval"] = half
            cells.append(f"{mean:.3f} ± {half:.3f}")
        table.add_row(name, way, *cells)
    Console(width=140).print(table)
    OUT.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
