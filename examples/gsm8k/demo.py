"""`make demo-gsm8k MODEL=DIR`: a real instruct model learns GSM8K on this machine.

Two processes, as anywhere else: `ibtpo-server` and `ibtpo-learner`, with the settings files of a
folder beside this one. It trains on GSM8K's train part and evaluates on held-out test problems
before and after. Started again after it was killed, it goes on where it was; another --out begins
anew.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "arith"))

import yaml
from memory import Memory, stop_leftovers
from processes import Ended, Process, command, running, wait_until_serving
from report import Run, write_report

from ibtree import Client, Prompt, Tree
from ibtree.client import RpcFailed
from ibtree.data.questions import read_questions
from ibtree.errors import FieldError
from ibtree.evaluation.accuracy import paired_gain
from ibtree.evaluation.problems import outcomes_by_content
from ibtree.messages import Chat, ChatMessage

HERE = Path(__file__).parent
SYSTEM = (HERE / "system_prompt.txt").read_text().strip()
POLL_S = 5.0


def learner_line(arguments: argparse.Namespace, server: str) -> list[str]:
    out, settings = arguments.out, arguments.settings
    steps = [f"--steps={arguments.steps}"] if arguments.steps else []
    return command(
        "ibtpo-learner",
        f"--config={settings / 'learner.yaml'}",
        f"--server={server}",
        f"--model={arguments.model}",
        f"--prompts={arguments.train}",
        f"--eval-prompts={out / 'held_out.jsonl'}",
        f"--system-prompt={SYSTEM}",
        f"--out-dir={out / 'learner'}",
        *steps,
    )


def server_line(arguments: argparse.Namespace) -> list[str]:
    settings = yaml.safe_load((arguments.settings / "server.yaml").read_text())
    # of the KV pool: room for 64 contexts of 512 tokens, where memory is the learner's, too
    pool = ["--", "--max-total-tokens=32768"] if settings["device"] == "cpu" else []
    return command(
        "ibtpo-server",
        f"--config={arguments.settings / 'server.yaml'}",
        f"--model={arguments.model}",
        f"--data-dir={arguments.out / 'server'}",
        *("--port=0", "--health-port=0", "--web-port=0"),
        *pool,
    )


def rows_of(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


class Follower:
    """Shows what the learner does: its figures as they come, and a line that says how far it is."""

    def __init__(self, metrics: Path, steps: int, prompts: int) -> None:
        self._metrics, self._steps, self._prompts = metrics, steps, prompts
        self._shown = len(rows_of(metrics))
        self._began = time.monotonic()

    def until_done(self, process: Process, target: str, memory: Memory) -> None:
        """Returns when the learner has ended. Raises Ended if it failed."""
        with Client(target, timeout_s=5) as client:
            while True:
                alive = process.running()
                self._show_rows()
                memory.look()
                if not alive:
                    break
                self._show_line(client)
                time.sleep(POLL_S)
        if process.popen.returncode:
            raise Ended(f"the learner ended; its last words:\n{process.last_words()}")

    def _show_rows(self) -> None:
        rows = rows_of(self._metrics)
        for row in rows[self._shown :]:
            if row["kind"] == "eval":
                print(
                    f"  step {row['step']:>3}   held-out accuracy {row['accuracy']:.3f}   95 % "
                    f"[{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]",
                    flush=True,
                )
            else:
                print(
                    f"  step {row['step']:>3}   reward {row['reward']:.3f}   "
                    f"{row['generated_tokens']:.0f} tokens   {self._elapsed()}",
                    flush=True,
                )
        self._shown = len(rows)

    def _elapsed(self) -> str:
        return f"{(time.monotonic() - self._began) / 60:.1f} min"

    def _show_line(self, client: Client) -> None:
        if not sys.stdout.isatty():
            return
        try:
            stats = client.queue_stats()
        except RpcFailed:  # it starts anew: the line waits
            return
        ready = stats.graded + stats.leased
        print(
            f"  {ready} of {self._prompts} trees ready, {stats.growing} grow, {stats.interactive} "
            f"evaluated   {self._elapsed()}, {self._left()}     ",
            end="\r",
            flush=True,
        )

    def _left(self) -> str:
        """By the steps so far, their evaluations included."""
        steps = [row for row in rows_of(self._metrics) if row["kind"] == "step"]
        if not steps:
            return "time left unknown yet"
        left = (self._steps - steps[-1]["step"]) * steps[-1]["at_s"] / len(steps)
        return f"about {left / 60:.0f} min left"


def prepare(arguments: argparse.Namespace) -> None:
    """The folder, with the held-out problems; a folder of another run is refused."""
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    identity = {
        "model": str(arguments.model.resolve()),
        "settings": str(arguments.settings.resolve()),
        "problems": arguments.problems,
    }
    note = out / "demo.json"
    if note.is_file() and json.loads(note.read_text()) != identity:
        raise FieldError("out", f"{out} holds a run of another model or settings", "another folder")
    questions = read_questions(arguments.test)
    chosen = random.Random(0).sample(questions, min(arguments.problems, len(questions)))
    lines = [json.dumps({"prompt": q.prompt, "answer": q.answer}) + "\n" for q in chosen]
    (out / "held_out.jsonl").write_text("".join(lines))
    note.write_text(json.dumps(identity))


def sample_tree(target: str, problem: dict[str, str]) -> tuple[Tree, str]:
    """A tree of the trained model."""
    chat = Chat((ChatMessage("system", SYSTEM), ChatMessage("user", problem["prompt"])))
    with Client(target) as client:
        tree = client.sample_tree(
            Prompt(chat, answer=problem["answer"]), include_text=True, timeout_s=3600
        )
    return tree, problem["prompt"]


def gain_of(evaluations: Path, last_step: int) -> dict[str, float]:
    """What the held-out problems gained from before the first step to after the last."""
    before, after = (
        {key: outcome.mean for key, outcome in outcomes_by_content(path).items()}
        for path in (evaluations / f"step-{step}.jsonl" for step in (0, last_step))
    )
    gain = paired_gain(before, after)
    return {
        "accuracy_gain": gain.mean,
        "accuracy_gain_low": gain.low,
        "accuracy_gain_high": gain.high,
    }


def summarise(run: Run, memory: Memory, evaluations: Path) -> dict[str, Any]:
    steps = run.of("step")
    phases = [f"seconds_{name}" for name in ("sample", "learn", "publish", "checkpoint")]
    return {
        **run.summary(),
        **gain_of(evaluations, steps[-1]["step"]),
        "steps_per_trajectory": sum(row["steps_per_trajectory"] for row in steps) / len(steps),
        "peak_memory_gib": memory.peak_bytes / 2**30,
        "seconds": sum(row.get(phase) or 0.0 for row in steps for phase in phases),
    }


def print_table(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", title="GSM8K")
    table.add_column("value", justify="right")
    for name, value in summary.items():
        table.add_row(name, "unknown" if value is None else f"{value:.4g}")
    Console(markup=False).print(table)


def demo(arguments: argparse.Namespace) -> None:
    out = arguments.out
    prepare(arguments)
    stop_leftovers(out)  # of a demo that was killed itself
    settings = yaml.safe_load((arguments.settings / "learner.yaml").read_text())
    steps = arguments.steps or settings["steps"]
    metrics = out / "learner" / "metrics.jsonl"
    with ExitStack() as stack:
        print("Starting the server …", flush=True)
        server = stack.enter_context(running(server_line(arguments), out / "server.log"))
        memory = Memory(out, server.popen.pid)
        target = wait_until_serving(server).grpc
        learner = stack.enter_context(running(learner_line(arguments, target), out / "learner.log"))
        memory.add(learner.popen.pid)
        print(f"IB-TPO: {steps} steps of {settings['prompts_per_step']} trees", flush=True)
        Follower(metrics, steps, settings["prompts_per_step"]).until_done(learner, target, memory)
        run = Run("IB-TPO", rows_of(metrics))
        done = max((row["step"] for row in run.of("step")), default=0)
        if done < steps:  # somebody told the learner to
            raise Ended(
                f"the learner stopped after step {done} of {steps}; started again it goes on"
            )
        problem = rows_of(out / "held_out.jsonl")[0]
        tree, prompt = sample_tree(target, problem)
    summary = summarise(run, memory, out / "learner" / "eval")
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    write_report(out / "report.html", [run], tree, tree.texts, prompt, summary)
    print_table(summary)
    print(f"\nCurves and a grown tree: {out / 'report.html'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of an instruct model")
    parser.add_argument("--settings", default="cpu-0.5b", help="a folder beside this file")
    parser.add_argument(
        "--train", default="hf:openai/gsm8k:main:train", help="problems to train on"
    )
    parser.add_argument("--test", default="hf:openai/gsm8k:main:test", help="held-out problems")
    parser.add_argument("--problems", type=int, default=32, help="how many of those")
    parser.add_argument("--steps", type=int, help="steps, if not the settings'")
    parser.add_argument("--out", type=Path, default=Path("runs/gsm8k"))
    arguments = parser.parse_args()
    arguments.settings = HERE / arguments.settings
    if not (arguments.model / "config.json").is_file():
        sys.exit(
            f"demo-gsm8k: {arguments.model} is no Hugging Face folder; give MODEL=DIR, any "
            "instruct model of about half a billion parameters"
        )
    if not (arguments.settings / "server.yaml").is_file():
        there = ", ".join(sorted(p.parent.name for p in HERE.glob("*/server.yaml")))
        sys.exit(f"demo-gsm8k: no settings {arguments.settings.name}; there are {there}")
    try:
        demo(arguments)
    except KeyboardInterrupt:
        sys.exit("demo-gsm8k: interrupted; started again it goes on where it was")
    except FieldError as error:
        sys.exit(f"demo-gsm8k: {error.as_option()}")
    except (Ended, RpcFailed) as error:
        sys.exit(f"demo-gsm8k: {error}")


if __name__ == "__main__":
    main()
