"""`make demo`: a real server and a real learner make the tiny arith model better, on this machine.

Two processes, as anywhere else: `ibtpo-server` (SGLang on the CPU) and `ibtpo-learner`. With
--compare, GRPO is trained from the same model until it has generated as many tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import task
from processes import (
    MODEL,
    Ended,
    Process,
    learner_command,
    running,
    server_command,
    wait_until_serving,
)
from report import Run, write_report

from ibtree import Client, Prompt, Tree
from ibtree.client import RpcFailed

TERMS = 6
TRAIN_PROBLEMS, HELD_OUT_PROBLEMS = 4096, 256


@contextlib.contextmanager
def server(out: Path, name: str) -> Iterator[str]:
    """The address of a server that starts from the untrained model."""
    line = server_command(out / f"{name}-server")
    with running(line, out / f"{name}-server.log") as process:
        yield wait_until_serving(process).grpc


def follow(process: Process, metrics: Path) -> None:
    """Shows the learner's figures as they come, until it ends."""
    seen = 0
    while True:
        alive = process.running()
        rows = metrics.read_text().splitlines() if metrics.is_file() else []
        for line in rows[seen:]:
            show(json.loads(line))
        seen = len(rows)
        if not alive:
            return
        time.sleep(0.3)


def show(row: dict[str, Any]) -> None:
    if row["kind"] == "eval":
        print(
            f"  step {row['step']:>3}   held-out accuracy {row['accuracy']:.3f}   "
            f"95 % [{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]",
            flush=True,
        )
    elif sys.stdout.isatty():
        print(f"  step {row['step']:>3}   reward {row['reward']:.3f}", end="\r", flush=True)


def learn(target: str, out: Path, name: str, arguments: list[str]) -> list[dict[str, Any]]:
    """Trains with these arguments; returns the rows of metrics.jsonl."""
    folder = out / name
    line = learner_command(
        target,
        out / "train.jsonl",
        folder,
        f"--eval-prompts={out / 'held_out.jsonl'}",
        "--prompts-per-step=32",
        *arguments,
    )
    with running(line, out / f"{name}.log") as process:
        follow(process, folder / "metrics.jsonl")
        if process.popen.returncode:
            raise Ended(f"the learner ended; its last words:\n{process.last_words()}")
    return read_rows(folder / "metrics.jsonl")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sample_tree(target: str, problem: task.Problem) -> tuple[Tree, list[str]]:
    """A tree of the untrained model, and the text of each of its steps."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    with Client(target) as client:
        tree = client.sample_tree(Prompt(problem.prompt, answer=problem.answer))
    texts = [tokenizer.decode(step.token_ids, skip_special_tokens=True) for step in tree.steps]
    return tree, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, default=36, help="optimiser steps")
    parser.add_argument("--compare", action="store_true", help="also train GRPO")
    arguments = parser.parse_args()
    try:
        demo(arguments.out, arguments.steps, arguments.compare)
    except KeyboardInterrupt:
        sys.exit("demo: interrupted; everything it started is stopped")
    except (Ended, RpcFailed) as error:
        sys.exit(f"demo: {error}")


def demo(out: Path, steps: int, compare: bool) -> None:
    began = time.monotonic()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    train, held_out = task.split(TRAIN_PROBLEMS, HELD_OUT_PROBLEMS, TERMS, seed=0)
    task.write_jsonl(out / "train.jsonl", train)
    task.write_jsonl(out / "held_out.jsonl", held_out)

    print("Starting SGLang on the CPU …", flush=True)
    shape = ["--init-rollouts=4", "--rounds=9", "--branch-nodes=1", "--branch-rollouts=1"]
    with server(out, "ib-tpo") as target:
        tree, texts = sample_tree(target, held_out[0])
        print(f"IB-TPO: {steps} steps of 32 trees, (B0, L, K, B) = (4, 9, 1, 1)", flush=True)
        evaluate = f"--eval-every-steps={(steps + 1) // 2}"
        rows = learn(target, out, "ib-tpo", [f"--steps={steps}", evaluate, "--strategy=ib", *shape])
    seconds = time.monotonic() - began
    runs = [Run("IB-TPO", rows)]
    if compare:
        runs.append(Run("GRPO", grpo(out, rows)))
    summary = runs[0].summary() | {"seconds": seconds}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    write_report(out / "report.html", runs, tree, texts, held_out[0].prompt, summary)
    print_table(runs, seconds)
    print(f"\nCurves and a grown tree: {out / 'report.html'}")
    print("Your own model: ibtpo-server --model DIR, then ibtpo-learner --model DIR --prompts FILE")


def grpo(out: Path, ib_rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """GRPO with 8 independent rollouts, stopped at IB-TPO's number of generated tokens."""
    steps = [row for row in ib_rows if row["kind"] == "step"]
    budget, per_step = steps[-1]["tokens"], steps[0]["generated_tokens"]
    print("GRPO: groups of 8 independent rollouts, the same number of generated tokens", flush=True)
    with server(out, "grpo") as target:
        return learn(
            target,
            out,
            "grpo",
            [
                f"--max-tokens={budget:.0f}",
                f"--steps={max(round(3 * budget / per_step), 1)}",
                f"--eval-every-steps={(len(steps) + 1) // 2}",
                "--strategy=independent",
                "--init-rollouts=8",
                "--rounds=1",
                "--local-weight=0",
            ],
        )


def print_table(runs: list[Run], seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"arith, {TERMS} terms, {HELD_OUT_PROBLEMS} held-out problems")
    for column in ("", "before", "after (95 %)", "eff_rate", "tokens", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    for run in runs:
        s = run.summary() | {"seconds": run.rows[-1]["at_s"]}
        interval = f"[{s['accuracy_after_low']:.3f}, {s['accuracy_after_high']:.3f}]"
        table.add_row(
            run.name,
            f"{s['accuracy_before']:.3f}",
            f"{s['accuracy_after']:.3f} {interval}",
            f"{s['eff_rate']:.3f}",
            f"{s['generated_tokens']:,.0f}",
            f"{s['seconds']:.0f}",
        )
    Console(markup=False).print(table)
    print(f"IB-TPO from start to end, engine start included: {seconds:.0f} s")


if __name__ == "__main__":
    main()
