"""What a run tells: a live line in the terminal, metrics.jsonl, TensorBoard.

The row of a step is written when the step is over, its checkpoint durable and its weights pushed.
A run that was killed in between finds the figures in the checkpoint and writes the row then,
without the seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ibtree.evaluation.accuracy import Accuracy
from ibtree.tree import Tree, score
from learner.errors import writing
from learner.io.checkpoint import TrainState
from learner.io.metrics import MetricsFile
from learner.tree.training import is_uniform

Figures = dict[str, float]
_SHOWN = ("reward", "eff_rate", "loss", "log_prob_gap_mean")


def tree_figures(trees: list[Tree], version: int) -> Figures:
    """Means over a step's trees: rewards, Eff-Rate (share of trees with reward variance), IB-Score
    of non-leaf nodes, balance (arXiv 2605.28109, diagnosis), staleness [versions], tokens. Of all
    their trajectories: mean and median of the steps in each; with 1 there is nothing to branch
    from."""

    def mean(values: list[float]) -> float:
        known = [v for v in values if math.isfinite(v)]
        return float(np.mean(known)) if known else float("nan")

    steps = [count for tree in trees for count in _step_counts(tree)]
    scores = [s for tree in trees for s in score.ib_scores(tree)]
    return {
        "reward": mean([float(tree.rewards().mean()) for tree in trees]),
        "first_round_reward": mean(
            [t.first_round_reward for t in trees if t.first_round_reward is not None]
        ),
        "eff_rate": mean([float(not is_uniform(tree)) for tree in trees]),
        "ib_score": mean(scores),
        "balance": mean([score.balance(tree) for tree in trees]),
        "staleness_mean": mean([float(staleness(tree, version)) for tree in trees]),
        "staleness_max": float(max(staleness(tree, version) for tree in trees)),
        "steps_per_trajectory": float(np.mean(steps)),
        "steps_median": float(np.median(steps)),
        "trajectories": float(sum(tree.trajectories for tree in trees)),
        "generated_tokens": float(sum(tree.ledger.generated_tokens for tree in trees)),
        "unique_tokens": float(sum(tree.unique_tokens for tree in trees)),
        "prefix_tokens": float(sum(tree.ledger.prefix_tokens for tree in trees)),
        "cached_tokens": float(sum(tree.ledger.cached_tokens for tree in trees)),
    }


def _step_counts(tree: Tree) -> list[int]:
    """Steps of each of the tree's trajectories; one that came twice counts twice."""
    return [tree.depth_steps(end) for end in tree.end_nodes() for _ in range(tree.ends[end])]


def staleness(tree: Tree, version: int) -> int:
    """Trainer version minus the version of the tree's oldest token, at least 0."""
    return max(version - min(v for step in tree.steps for v in step.versions), 0)


class Reporter:
    """Use as a context manager; `phase` measures seconds, `step` and `accuracy` write. It begins
    where `state` is: what was reported of later steps, which will be taken again, goes."""

    def __init__(self, out_dir: Path, steps: int, state: TrainState) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._out_dir = out_dir
        self._file = MetricsFile(out_dir / "metrics.jsonl", state.step)
        with writing("metrics", out_dir):
            self._board = SummaryWriter(str(out_dir / "tensorboard"), purge_step=state.step + 1)
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("step"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=steps)
        self._seconds: Figures = {}
        self._began = time.monotonic()
        if state.step and not self._file.has("step", state.step):
            self.step(state.step, state.figures)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        with suppress(OSError):  # each row was flushed; what is left did not fit on the disk
            self._file.close()
        with suppress(OSError):
            self._board.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to this step's `seconds_<name>`."""
        begin = time.monotonic()
        try:
            yield
        finally:
            key = f"seconds_{name}"
            self._seconds[key] = self._seconds.get(key, 0.0) + time.monotonic() - begin

    def step(self, step: int, figures: Figures) -> None:
        """Figures of one step; the phases since the last one are added, and of the learn phase the
        share spent outside forward, backward and optimiser."""
        figures = figures | self._seconds
        if learn := self._seconds.get("seconds_learn"):  # there are none of a step from before
            figures["learn_overhead_share"] = 1.0 - figures["seconds_compute"] / learn
        self._seconds = {}
        self._write("step", step, figures)
        line = "  ".join(f"{name} {figures[name]:.3g}" for name in _SHOWN)
        self._progress.update(self._task, completed=step, description=line)
        if not self._console.is_terminal:
            self._console.print(f"step {step}  {line}", highlight=False, soft_wrap=True)

    def accuracy(self, step: int, accuracy: Accuracy) -> None:
        """A held-out evaluation."""
        figures = {
            "accuracy": accuracy.mean,
            "accuracy_low": accuracy.low,
            "accuracy_high": accuracy.high,
            "problems": float(accuracy.problems),
            "samples": float(accuracy.samples),
            "pass_at_n": accuracy.pass_at_n,
            "truncated": float(accuracy.truncated),
            "failed": float(accuracy.failed),
            "temperature": accuracy.temperature,
            "max_new_tokens": float(accuracy.max_new_tokens),
            "seconds": accuracy.seconds,
        }
        self._write("eval", step, figures)
        line = (
            f"step {step}  held-out accuracy {accuracy.mean:.3f} "
            f"[{accuracy.low:.3f}, {accuracy.high:.3f}] on {accuracy.problems}"
        )
        if accuracy.truncated:
            line += f", {accuracy.truncated} rollouts cut off at {accuracy.max_new_tokens} tokens"
        self.say(line)
        if accuracy.failed:
            self.say(
                f"warning: step {step}: {accuracy.failed} held-out problems failed; the first: "
                f"{accuracy.first_failure}"
            )

    def evaluated(self, step: int) -> bool:
        """True if `accuracy` was told of this step."""
        return self._file.has("eval", step)

    def best_accuracy(self) -> float:
        """The highest so far; -1 before the first."""
        accuracies = [row["accuracy"] for row in self._file.rows if row["kind"] == "eval"]
        return max(accuracies, default=-1.0)

    def say(self, text: str) -> None:
        """A line that stays above the progress line."""
        self._progress.console.print(text, highlight=False, soft_wrap=True)

    def _write(self, kind: str, step: int, figures: Figures) -> None:
        seconds = time.monotonic() - self._began
        self._file.append({"kind": kind, "step": step, "at_s": seconds, **figures})
        with writing("metrics", self._out_dir):
            for name, value in figures.items():
                if math.isfinite(value):
                    self._board.add_scalar(f"{kind}/{name}", value, step)
            self._board.flush()
