"""Figures of a step, the interval, what is written, and what a resumed run finds written."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest

from ibtree.evaluation.accuracy import Accuracy, wilson
from ibtree.tree import Finish, Ledger, Step, Tree
from learner.errors import WriteError
from learner.io.checkpoint import TrainState
from learner.io.report import Reporter, staleness, tree_figures


def step(ids: tuple[int, ...], logprob: float, version: int) -> Step:
    return Step(ids, (logprob,) * len(ids), (version,) * len(ids))


def two_trees() -> list[Tree]:
    """One with variance (rewards 1, 0, 1), branched at its first step; one without (1, 1)."""
    first = Tree(
        prompt=(7,),
        ledger=Ledger(generated_tokens=9, prefix_tokens=20, cached_tokens=15),
        first_round_reward=0.5,
    )
    first.insert(0, [step((1, 2), -0.5, 4), step((3,), -1.0, 5)], 1.0, Finish.STOP)
    first.insert(1, [step((4, 5), -2.0, 6)], 0.0, Finish.STOP)
    first.insert(0, [step((6,), -0.1, 5)], 1.0, Finish.LENGTH)
    second = Tree(prompt=(7,), ledger=Ledger(3, 2, 1))
    second.insert(0, [step((1,), -0.5, 6)], 1.0, Finish.STOP)
    second.insert(0, [step((1,), -0.5, 6)], 1.0, Finish.STOP)
    return [first, second]


def test_figures_by_hand():
    figures = tree_figures(two_trees(), version=7)
    # root of the first: children (1, 2) with value 1/2 drawn once and (6,) with value 1
    gains = [(1 / 2) / (2 / 3) - 1.2, 1 / (2 / 3) - 1.2]
    sure = [math.exp(-0.5), math.exp(-0.1)]
    below, sure_below = [1 / (1 / 2) - 1.2, 0 - 1.2], [math.exp(-1.0), math.exp(-2.0)]
    scores = [
        6 / 2 * np.dot(gains, sure),
        6 / 2 * np.dot(below, sure_below),
        6 * (1 - 1.2) * math.exp(-0.5),
    ]
    covariances = [np.cov(gains, sure, ddof=0)[0, 1], np.cov(below, sure_below, ddof=0)[0, 1]]
    assert figures == pytest.approx(
        {
            "reward": (2 / 3 + 1) / 2,
            "first_round_reward": 0.5,
            "eff_rate": 0.5,
            "ib_score": np.mean(scores),
            "balance": np.mean(covariances),
            "staleness_mean": (3 + 1) / 2,
            "staleness_max": 3.0,
            # of the first 2, 2 and 1; the second's only one was drawn twice
            "steps_per_trajectory": (2 + 2 + 1 + 1 + 1) / 5,
            "steps_median": 1.0,
            "trajectories": 5.0,
            "generated_tokens": 12.0,
            "unique_tokens": 6.0 + 1.0,
            "prefix_tokens": 22.0,
            "cached_tokens": 16.0,
        }
    )


def test_what_is_not_known_is_nan():
    figures = tree_figures(two_trees()[1:], version=7)
    assert math.isnan(figures["first_round_reward"]) and math.isnan(figures["balance"])
    assert figures["eff_rate"] == 0.0 and figures["reward"] == 1.0


def test_staleness_is_that_of_the_oldest_token():
    tree = two_trees()[0]
    assert [staleness(tree, version) for version in (9, 5, 4, 0)] == [5, 1, 0, 0]


@pytest.mark.parametrize(
    ("mean", "count", "low", "high"),
    [  # at the ends z^2 / (n + z^2)
        (0.5, 100, 0.40383, 0.59617),
        (0.0, 10, 0.0, 0.27753),
        (1.0, 10, 0.72247, 1.0),
        (0.1, 50, 0.04348, 0.21361),
        (1.0, 1, 0.20655, 1.0),
    ],
)
def test_wilson_interval(mean, count, low, high):
    assert wilson(mean, count) == pytest.approx((low, high), abs=2e-5)
    for end in wilson(mean, count):  # |mean - p| = z sqrt(p (1 - p) / n): its definition
        want = 1.959964 * math.sqrt(end * (1 - end) / count)
        assert abs(mean - end) == pytest.approx(want, abs=1e-6)


def test_wilson_without_observations():
    assert wilson(0.0, 0) == (0.0, 1.0)


def lines(folder) -> list[dict]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    text = (folder / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def figures(**changes: float) -> dict[str, float]:
    known = tree_figures(two_trees(), version=7) | {"seconds_compute": 0.0}
    return known | {"loss": 0.25, "log_prob_gap_mean": math.nan, "pause_s": math.inf, **changes}


def test_metrics_are_json_with_null_for_what_is_not_known(tmp_path):
    out = tmp_path / "run"
    with Reporter(out, 3, TrainState()) as report:
        with report.phase("learn"):
            time.sleep(0.02)
        with report.phase("learn"), report.phase("inner"):
            time.sleep(0.01)
        report.step(1, figures())
        report.step(2, figures(loss=-1.5))
        report.accuracy(2, Accuracy(0.5, 0.4, 0.6, 100))
        report.say("[bold] is not markup?")
    with Reporter(out, 3, TrainState(step=2)) as report:  # a resumed run goes on in the same file
        report.step(3, figures())
    first, second, evaluated, third = lines(out)
    assert [row["step"] for row in (first, second, evaluated, third)] == [1, 2, 2, 3]
    assert [row["kind"] for row in (first, second, evaluated, third)] == [
        "step", "step", "eval", "step"
    ]  # fmt: skip
    assert first["log_prob_gap_mean"] is None and first["pause_s"] is None
    assert (first["loss"], second["loss"]) == (0.25, -1.5)
    assert first["seconds_learn"] >= 0.03 and first["seconds_inner"] >= 0.01
    assert "seconds_learn" not in second  # the phases are those since the step before
    assert second["at_s"] >= first["at_s"] >= 0
    assert evaluated["accuracy"] == 0.5 and evaluated["problems"] == 100
    assert (evaluated["accuracy_low"], evaluated["accuracy_high"]) == (0.4, 0.6)
    assert list((out / "tensorboard").glob("events.out.tfevents.*"))


def test_a_phase_that_fails_is_measured(tmp_path):
    with Reporter(tmp_path, 1, TrainState()) as report:
        with pytest.raises(ValueError, match="no"), report.phase("sample"):
            raise ValueError("no")
        report.step(1, figures())
    assert lines(tmp_path)[0]["seconds_sample"] >= 0


def test_a_line_a_step_where_there_is_no_terminal(tmp_path, capfd):
    with Reporter(tmp_path, 2, TrainState()) as report:
        report.step(1, figures(loss=0.125))
    written = capfd.readouterr().err
    assert "step 1" in written and "loss 0.125" in written and "\x1b[" not in written


def test_a_resumed_run_takes_back_what_it_takes_again(tmp_path):
    """Killed in step 4, its checkpoint is of step 2: one row a step in the end, in order."""
    with Reporter(tmp_path, 4, TrainState()) as report:
        report.accuracy(0, Accuracy(0.25, 0.2, 0.3, 100))
        for number in (1, 2, 3):
            report.step(number, figures(loss=number))
        report.accuracy(3, Accuracy(0.75, 0.7, 0.8, 100))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    state = TrainState(step=2, figures=figures(loss=22.0))
    with Reporter(tmp_path, 4, state) as report:
        assert report.evaluated(0) and not report.evaluated(3)
        assert report.best_accuracy() == 0.25
        report.step(3, figures(loss=33.0))
    rows = lines(tmp_path)
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("eval", 0), ("step", 1), ("step", 2), ("step", 3)
    ]  # fmt: skip
    assert [row["loss"] for row in rows[1:]] == [1.0, 2.0, 33.0]


def test_the_row_that_a_kill_prevented_comes_from_the_checkpoint(tmp_path):
    """Killed between the checkpoint of step 2 and its row."""
    with Reporter(tmp_path, 4, TrainState()) as report:
        report.step(1, figures(loss=1.0))
    for _ in range(2):
        with Reporter(tmp_path, 4, TrainState(step=2, figures=figures(loss=22.0))) as report:
            assert report.best_accuracy() == -1.0
    assert [(row["step"], row["loss"]) for row in lines(tmp_path)] == [(1, 1.0), (2, 22.0)]


def test_the_learn_phase_tells_what_it_spent_outside_the_model(tmp_path, monkeypatch):
    clock = iter([0.0, 10.0, 14.0, 20.0])
    monkeypatch.setattr("learner.io.report.time.monotonic", lambda: next(clock))
    with Reporter(tmp_path, 1, TrainState()) as report:
        with report.phase("learn"):
            pass
        report.step(1, figures(seconds_compute=3.0))
    assert lines(tmp_path)[0]["learn_overhead_share"] == pytest.approx(1 - 3 / 4)


def test_metrics_that_do_not_fit_on_the_disk_end_the_run(tmp_path):
    """/dev/full: the disk that is always full."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with (
        pytest.raises(WriteError, match="metrics could not be written"),
        Reporter(tmp_path, 1, TrainState()) as report,
    ):
        report.step(1, figures())
