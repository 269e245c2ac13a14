"""The learner's held-out evaluations: their own sampling, going on after a kill, being stopped."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest

from ibtree.data.questions import Question
from ibtree.errors import FieldError
from ibtree.evaluation.accuracy import Accuracy
from learner.errors import WriteError
from learner.io import held_out
from learner.io.checkpoint import TrainState
from learner.io.held_out import eval_options, evaluate_held_out
from learner.io.report import Reporter
from tests.learner.tiny import config
from tests.server_ext.fakes import until
from tests.server_ext.site import Site

QUESTIONS = [Question(f"{n}?", "1") for n in range(40)]


@pytest.fixture
async def site(tmp_path):
    async with Site(tmp_path, max_calls=64) as site:
        yield site


async def evaluated(site: Site, folder: Path, stop=(), said=None, alive=None, **changes):
    said, alive = ([] if said is None else said), ([] if alive is None else alive)
    settings = config(server=site.target, out_dir=folder, patience_s=20.0, **changes)
    return await asyncio.to_thread(
        evaluate_held_out, settings, QUESTIONS, 7, said.append, lambda: alive.append(1), stop
    )


def test_evaluations_are_sampled_as_trees_are_but_for_their_own():
    options = eval_options(config(temperature=0.9, top_k=5, min_p=0.1, stop=["END"]))
    assert (options["temperature"], options["top_k"], options["top_p"]) == (0.9, 5, 0.95)
    assert options["stop"] == ("END",) and options["min_p"] == 0.1
    assert "max_new_tokens" not in options, "nobody set it: it is the server's"
    own = {"eval_temperature": 0.2, "eval_top_p": 1.0, "eval_top_k": -1, "eval_max_new_tokens": 99}
    options = eval_options(config(temperature=0.9, max_new_tokens=50, **own))
    assert {name: options[name.removeprefix("eval_")] for name in own} == own


async def test_it_goes_on_where_a_killed_one_stopped(site, tmp_path):
    own = {"eval_samples": 4, "eval_temperature": 0.5, "eval_max_new_tokens": 32}
    accuracy = await evaluated(site, tmp_path / "run", **own)
    assert (accuracy.problems, accuracy.samples) == (40, 4)
    assert (accuracy.temperature, accuracy.max_new_tokens) == (0.5, 32)
    path = tmp_path / "run/eval/step-7.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 40 and len(json.loads(lines[0])["rewards"]) == 4
    path.write_text("".join(lines[:30]))
    site.engine.requests.clear()
    said: list[str] = []
    again = await evaluated(site, tmp_path / "run", said=said, **own)
    assert len(site.engine.requests) == 40, "10 problems of 4 samples"
    assert (again.mean, again.low, again.pass_at_n) == (
        accuracy.mean, accuracy.low, accuracy.pass_at_n
    )  # fmt: skip
    (line,) = said
    assert line.startswith("step 7  held-out: 30 of 40 problems were finished before")


async def test_it_tells_how_far_it_is_and_ends_when_told_to(site, tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "_LINE_S", 0.1)
    monkeypatch.setattr(held_out, "_TICK_S", 0.05)
    site.engine.go_on.clear()
    said: list[str] = []
    alive: list[int] = []
    stop: list[int] = []
    evaluation = asyncio.create_task(evaluated(site, tmp_path / "run", stop, said, alive))
    await until(lambda: len(said) >= 3)
    assert said[-1] == "step 7  held-out: 0 of 40 problems" and len(alive) >= 3
    stop.append(15)
    assert await evaluation is None
    await until(lambda: not site.engine.running)
    assert threading.active_count() < 50


async def test_a_full_disk_and_settings_that_do_not_fit(site, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/eval").write_text("in the way")
    with pytest.raises(WriteError, match="the evaluation could not be written"):
        await evaluated(site, tmp_path / "run")
    with pytest.raises(FieldError, match=r"sampling\.top_k"):
        await evaluated(site, tmp_path / "other", eval_top_k=0)


def test_a_row_of_metrics_tells_what_was_evaluated_how(tmp_path, capfd):
    failure = "SampleTree: INVALID_ARGUMENT: prompt: 600 tokens"
    accuracy = Accuracy(0.5, 0.4, 0.6, 100, 8, 0.75, 12, 3, failure, 0.2, 99, 4.5)
    with Reporter(tmp_path, 1, TrainState()) as report:
        report.accuracy(0, accuracy)
        assert report.evaluated(0) and report.best_accuracy() == 0.5
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row.pop("at_s") >= 0
    assert row == {
        "kind": "eval",
        "step": 0,
        "accuracy": 0.5,
        "accuracy_low": 0.4,
        "accuracy_high": 0.6,
        "problems": 100,
        "samples": 8,
        "pass_at_n": 0.75,
        "truncated": 12,
        "failed": 3,
        "temperature": 0.2,
        "max_new_tokens": 99,
        "seconds": 4.5,
    }
    said = capfd.readouterr().err
    assert "12 rollouts cut off at 99 tokens" in said
    assert f"3 held-out problems failed; the first: {failure}" in said
