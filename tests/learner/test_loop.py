"""The loop against a real queue and real weights over gRPC: bad trees, bad steps, a full disk,
exports, a step's figures."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ibtpo_settings.folder import alone_in
from ibtree.tree import Finish, Tree
from ibtree.weights.model_folder import model_identity
from ibtree.weights.tensor_files import make_manifest
from ibtree.wire.v1 import tree_pb2
from learner.io.validate import tree_problem
from tests.ibtree.tree.growing import step_of
from tests.learner.recorded import RUN_ID, Learner, RecordedServer, record, write_model
from tests.learner.tiny import CPU

PER_STEP = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def site(tmp_path: Path, model: Path):
    recording = record(model, 40, PER_STEP, seed=3)
    with RecordedServer(tmp_path, model, recording, returns=2) as site:
        yield site


def new_learner(site: RecordedServer, model: Path, *options: str) -> Learner:
    common = (f"--prompts-per-step={PER_STEP}", "--kl-weight=0", "--lr=1e-3")
    return Learner(site, model, *common, *options)


def rows(learner: Learner, kind: str = "step") -> list[dict[str, Any]]:
    lines = (learner.out_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def cycle(tree: tree_pb2.Tree) -> None:
    tree.parents[1] = len(tree.parents) - 1


def orphan(tree: tree_pb2.Tree) -> None:
    tree.parents[-1] = len(tree.parents) + 7


def offsets(tree: tree_pb2.Tree) -> None:
    tree.token_offsets[1] += 1


def beyond(tree: tree_pb2.Tree) -> None:
    tree.token_ids[-1] = 40


def other_model(tree: tree_pb2.Tree) -> None:
    tree.model_id = "f" * 64


def no_reward(tree: tree_pb2.Tree) -> None:
    tree.reward_sums[-1] = math.nan


def endless_reward(tree: tree_pb2.Tree) -> None:
    for node in range(len(tree.reward_sums)):
        tree.reward_sums[node] = math.inf


def no_logprob(tree: tree_pb2.Tree) -> None:
    tree.logprobs[0] = math.nan


def no_prompt(tree: tree_pb2.Tree) -> None:
    del tree.prompt_token_ids[:]


HARM = {
    cycle: "tree.parents: not in order",
    orphan: "tree.parents: not in order",
    offsets: "tree.token_offsets",
    beyond: "token_ids: 40 is beyond the vocabulary of 40",
    other_model: "model_id: of model ffffffffffff…",
    no_reward: "tree.reward_sums: nan",
    endless_reward: "tree.reward_sums: inf",
    no_logprob: "tree.logprobs: got nan",
    no_prompt: "prompt_token_ids: an empty prompt",
}


def test_trees_that_can_not_be_trained_on_are_refused_and_the_loop_goes_on(
    site, model, monkeypatch
):
    """Two of the first four prompts, all four of the next, and some after."""
    monkeypatch.setattr("learner.io.leases._POLL_S", 0.2)
    numbers = [1, 2, 4, 5, 6, 7, 9, 10, 12]
    site.spoil = dict(zip(numbers, HARM, strict=True))
    learner = new_learner(site, model, "--steps=3")
    assert learner.run_here() == ""
    steps = rows(learner)
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert sum(row["refused_trees"] for row in steps) >= 7
    states, reasons = site.trees(), site.reasons()
    for number, why in zip(numbers, HARM.values(), strict=True):
        assert states[f"{RUN_ID}/{number}"] == "dead"
        told = json.loads(reasons[f"{RUN_ID}/{number}"])
        assert len(told) == 3 and all(why in reason for reason in told)
    good = {f"{RUN_ID}/{n}" for n in range(16)} - {f"{RUN_ID}/{n}" for n in numbers}
    assert {id_ for id_, state in states.items() if state == "acked"} == good


def test_a_tree_without_trajectories_is_refused():
    tree = Tree(prompt=(1,), model_id="m")
    assert tree_problem(tree, "m", 40) == "visits: no trajectory"
    tree.insert(0, [step_of((39,))], 1.0, Finish.STOP)
    assert tree_problem(tree, "m", 40) == "" and "beyond" in tree_problem(tree, "m", 39)


def test_a_run_told_to_stop_saves_gives_back_and_goes_on_later(site, model):
    """A stop between two checkpoints: what was trained on since the last one is not lost."""
    options = ("--prompts-ahead-steps=2", "--checkpoint-every-steps=100")
    learner = new_learner(site, model, "--steps=6", *options)
    site.after_calls(10, 0.0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert learner.run_here() == ""
    (folder,) = (learner.out_dir / "checkpoints").iterdir()
    done = int(folder.name.removeprefix("step-"))
    assert 1 <= done < 6 and len(rows(learner)) == done
    assert (learner.out_dir / "last" / "config.json").is_file()
    states = site.trees()
    assert "leased" not in states.values()
    assert list(states.values()).count("acked") == done * PER_STEP
    assert learner.run_here() == ""
    assert [row["step"] for row in rows(learner)] == [*range(1, 7)]
    assert list(site.trees().values()).count("acked") == 6 * PER_STEP


def test_a_run_told_to_stop_while_its_server_does_not_answer_ends_at_once(site, model):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        learner = new_learner(site, model, f"--server=127.0.0.1:{silent.getsockname()[1]}")
        process = learner.start()
        try:
            with silent.accept()[0]:
                process.terminate()
                assert process.wait(10) == -signal.SIGTERM
        finally:
            process.kill()


def test_a_folder_in_which_another_learner_runs_is_refused(site, model):
    learner = new_learner(site, model, "--steps=1")
    with alone_in(learner.out_dir, "out_dir", "learner"):
        assert "in use by another learner" in learner.run_here()
        assert {path.name for path in learner.out_dir.iterdir()} == {"lock", "run.json"}
    assert learner.run_here() == ""


def test_a_damaged_checkpoint_costs_its_steps_and_the_run_goes_on(site, model, monkeypatch, caplog):
    """The trees of step 3 were acked: they are gone, and step 3 is taken again on the next."""
    monkeypatch.setattr("learner.io.leases._POLL_S", 0.2)
    assert new_learner(site, model, "--steps=3").run_here() == ""
    learner = new_learner(site, model, "--steps=4")
    newest = learner.out_dir / "checkpoints" / "step-00000003"
    os.truncate(newest / "__0_0.distcp", 1000)
    assert learner.run_here() == ""
    assert "kept aside, going on from step-00000002" in caplog.text
    assert newest.with_suffix(".damaged").is_dir()
    assert [row["step"] for row in rows(learner)] == [1, 2, 3, 4]
    assert site.updater.serving.version == 6  # 3, then step 2's weights again, steps 3 and 4
    acked = {id_ for id_, state in site.trees().items() if state == "acked"}
    assert acked == {f"{RUN_ID}/{n}" for n in range(5 * PER_STEP)}


def overflow(tree: tree_pb2.Tree) -> None:
    """Finite, but the ratio to it is not; where the advantage is negative nothing clips it."""
    tree.logprobs[:] = [-1e4] * len(tree.logprobs)


def test_steps_without_a_finite_gradient_are_skipped_and_too_many_stop_the_run(site, model):
    site.spoil = dict.fromkeys([1, *range(8, 40)], overflow)
    learner = new_learner(site, model, "--steps=9", "--max-bad-steps=3")
    said = learner.run_here()
    assert "3 steps in a row without a finite loss and gradient" in said and "step 5" in said
    assert [row["bad_steps"] for row in rows(learner)] == [1, 0, 1, 2, 3]
    assert [row["updates"] for row in rows(learner)] == [0, 1, 0, 0, 0]
    assert [row["loss"] is None for row in rows(learner)] == [True, False, True, True, True]
    assert site.updater.serving.version == 5
    again = learner.run_here()  # still bad: it does not go on for three more
    assert "4 steps in a row" in again and len(rows(learner)) == 6


def unrewarded(tree: tree_pb2.Tree) -> None:
    tree.reward_sums[:] = [0.0] * len(tree.reward_sums)


def test_a_step_without_a_tree_to_compare_warns_and_the_run_goes_on(site, model, capfd):
    site.spoil = dict.fromkeys(range(4), unrewarded)
    learner = new_learner(site, model, "--steps=2")
    assert learner.run_here() == ""
    assert [row["updates"] for row in rows(learner)] == [0, 1]
    said = [line for line in capfd.readouterr().err.splitlines() if "no tree to train on" in line]
    assert len(said) == 1
    assert "warning: step 1" in said[0] and "reward each (mean 0)" in said[0]


def trees_with(steps: Sequence[int], model: Path) -> list[Tree]:
    """A tree for each prompt of a step; its trajectories have so many steps."""
    recording = []
    for number in range(PER_STEP):
        tree = Tree(prompt=(7, 8), model_id=model_identity(model))
        for at, count in enumerate(steps):
            ids = [(at % 8, number, each) for each in range(count)]
            tree.insert(0, [step_of(each) for each in ids], float(at % 2), Finish.STOP)
        recording.append(tree)
    return recording


@pytest.mark.parametrize(
    ("steps", "strategy", "warned"),
    [
        ((1, 1, 9), "ib", True),  # the mean is far from 1
        ((1, 1, 2, 2), "ib", False),
        ((1, 1, 1, 1), "independent", False),  # which branches nowhere anyway
    ],
)
def test_trajectories_of_one_step_warn_with_the_remedy(
    tmp_path, model, capfd, steps, strategy, warned
):
    with RecordedServer(tmp_path, model, trees_with(steps, model)) as site:
        learner = new_learner(site, model, "--steps=1", f"--strategy={strategy}")
        assert learner.run_here() == ""
    (row,) = rows(learner)
    assert row["steps_per_trajectory"] == pytest.approx(sum(steps) / len(steps))
    assert row["steps_median"] == np.median(steps)
    said = [line for line in capfd.readouterr().err.splitlines() if "a single step" in line]
    assert len(said) == warned
    assert not said or ("warning: step 1" in said[0] and "--step-rule auto" in said[0])


@pytest.mark.parametrize(
    ("limit_bytes", "what"), [(300_000, "checkpoint"), (8_000, "weights to publish")]
)
def test_a_full_disk_stops_training_and_the_old_checkpoint_stays(site, model, limit_bytes, what):
    """The operating system's reason is told; weights to publish are smaller than a checkpoint."""
    learner = new_learner(site, model, "--steps=2")
    assert learner.run_here() == ""
    more = new_learner(site, model, "--steps=4")
    done = more.run(largest_file=limit_bytes)
    # Python 3.13 tells of a file that torch could not close after the learner's own last line
    last = next(line for line in done.said.splitlines() if line.startswith("ibtpo-learner: "))
    assert done.code == 1 and "could not be written" in last and what in last
    assert last.startswith("ibtpo-learner: ")
    folders = sorted(path.name for path in (more.out_dir / "checkpoints").iterdir())
    assert folders == ["step-00000001", "step-00000002"]
    assert more.run_here() == ""  # with room again
    assert [row["step"] for row in rows(more)] == [1, 2, 3, 4]
    acked = {id_ for id_, state in site.trees().items() if state == "acked"}
    assert acked == {f"{RUN_ID}/{n}" for n in range(4 * PER_STEP)}


def test_the_best_and_the_last_weights_are_plain_folders(site, model, tmp_path):
    for version, reward in enumerate([0.25, 0.5, 0.75, 0.5]):
        site.reward(version, reward)
    options = (f"--eval-prompts={tmp_path / 'prompts.jsonl'}", "--eval-every-steps=1")
    short = new_learner(site, model, "--steps=1", *options)
    assert short.run_here() == ""
    assert (tmp_path / "run/best").resolve() == (tmp_path / "run/last").resolve()
    learner = new_learner(site, model, "--steps=3", *options)
    assert learner.run_here() == ""
    assert [row["accuracy"] for row in rows(learner, "eval")] == [0.25, 0.5, 0.75, 0.5]
    folders = {name: learner.out_dir / name for name in ("best", "last")}
    assert len(list((learner.out_dir / "exports").iterdir())) == 2
    digests = {weights.version: weights.digest for weights in site.updater.retained}
    for (name, folder), number in zip(folders.items(), (2, 3), strict=True):
        weights = make_manifest(folder / "model.safetensors", number, "")
        assert weights.digest == digests[number], name
        assert (folder / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    loaded = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders.values()]
    weights = [torch.cat([w.flatten() for w in m.parameters()]) for m in loaded]
    assert weights[0].dtype == torch.float32 and weights[0].device == CPU
    assert not torch.equal(*weights)
    assert {model_identity(f) for f in folders.values()} == {model_identity(model)}
    assert learner.run_here() == ""  # a run that is over: nothing is evaluated or exported anew
    assert len(rows(learner, "eval")) == 4


def test_the_reference_may_be_another_folder(model, tmp_path):
    """KL to the model itself is 0 before the first update, to other weights it is not."""
    other = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.2)
    other.save_pretrained(tmp_path / "other")
    kls = []
    for run, more in [("own", []), ("other", [f"--reference-model={tmp_path / 'other'}"])]:
        with RecordedServer(tmp_path / run, model, record(model, 8, PER_STEP)) as site:
            learner = new_learner(site, model, "--steps=1", "--kl-weight=0.1", *more)
            assert learner.run_here() == ""
            kls += [row["kl"] for row in rows(learner)]
    assert kls[0] == pytest.approx(0, abs=1e-6) and kls[1] > 1e-3
