"""The learner under torchrun: two processes over gloo are one run, whatever befalls them.

IBTPO_SOAK=1 also takes a signal, a full disk and a rank that stalls, each a launch of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from learner.dist.balance import balanced
from learner.dist.commands import Command
from tests.learner.dist.ranks_child import CASES
from tests.learner.recorded import (
    ROOT,
    RUN_ID,
    Learner,
    RecordedServer,
    record,
    torchrun,
    write_model,
)
from tests.learner.tree.test_layout import SHAPES, tree_of

SOAK = pytest.mark.skipif(os.environ.get("IBTPO_SOAK") != "1", reason="IBTPO_SOAK=1 takes longer")
PER_STEP = 3
OPTIONS = (
    f"--prompts-per-step={PER_STEP}",
    "--kl-weight=0.01",
    "--lr=1e-3",
    "--micro-batch-tokens=40",
)
LONGEST_S = 120
"""Start-up of three processes on a busy machine, and the 30 s that torchrun gives those that do
not end."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def rows(learner: Learner) -> list[dict[str, Any]]:
    lines = (learner.out_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def rank_of(process: subprocess.Popen[bytes], rank: int) -> int:
    """The process id of a rank that this torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    wanted = f"RANK={rank}".encode()
    (process_id,) = [
        int(child)
        for child in children
        if wanted in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    ]
    return process_id


def ended(process: subprocess.Popen[bytes]) -> int:
    """Its exit code; a torchrun that does not end in time takes its ranks with it."""
    try:
        return process.wait(LONGEST_S)
    finally:
        process.terminate()
        process.wait(LONGEST_S)


def checked_by_ranks(argument: str, ranks: int = 2) -> str:
    """What so many ranks said that ran their checks to the end."""
    process = subprocess.Popen(
        [*torchrun(ranks), "-m", "tests.learner.dist.ranks_child", argument],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        said, _ = process.communicate(timeout=LONGEST_S)
    finally:
        process.terminate()
    assert process.returncode == 0, said
    return said


def acked(server: RecordedServer) -> set[str]:
    return {id_ for id_, state in server.trees().items() if state == "acked"}


def upto(steps: int) -> set[str]:
    return {f"{RUN_ID}/{n}" for n in range(steps * PER_STEP)}


@pytest.mark.timeout(400)
def test_two_ranks_one_of_them_killed_then_two_and_then_one_are_the_run_of_one(tmp_path, model):
    """Steps 1 to 10 on two ranks, whatever the kill, and 11 and 12 on one; in some steps fewer
    trees are trained on than there are ranks."""
    recording = record(model, 15 * PER_STEP, PER_STEP, seed=5)
    with (
        RecordedServer(tmp_path / "one", model, recording, seed=1) as quiet,
        RecordedServer(tmp_path / "two", model, recording, seed=2) as server,
    ):
        straight, spread = Learner(quiet, model, *OPTIONS), Learner(server, model, *OPTIONS)
        process = spread.start("--steps=10", ranks=2)
        server.after_calls(30, 0.0, lambda: os.kill(rank_of(process, 1), signal.SIGKILL))
        assert straight.run_here("--steps=12") == ""
        assert ended(process) == 1, spread.log.read_text()
        said = spread.log.read_text()
        assert "ibtpo-learner: rank 0 of 2: " in said and "another one died" in said
        assert 0 < len(rows(spread)) < 10

        assert ended(spread.start("--steps=10", ranks=2)) == 0, spread.log.read_text()
        newest = max((spread.out_dir / "checkpoints").iterdir())
        assert {"__0_0.distcp", "__1_0.distcp"} < {path.name for path in newest.iterdir()}
        assert spread.run_here("--steps=12") == ""
        assert acked(server) == acked(quiet) == upto(12)
    straight_rows, spread_rows = rows(straight), rows(spread)
    assert (
        [row["step"] for row in spread_rows]
        == [*range(1, 13)]
        == [row["step"] for row in straight_rows]
    )
    assert {0, 1, 2, 3} == {row["trained_trees"] for row in straight_rows}
    for name in ("loss", "kl", "clip_share", "grad_norm", "trained_trees", "updates", "tokens"):
        curve = [row[name] for row in spread_rows]
        assert curve == pytest.approx([row[name] for row in straight_rows], abs=1e-4, rel=1e-4), (
            name
        )
    ours, theirs = (
        load_file(learner.out_dir / "last/model.safetensors") for learner in (spread, straight)
    )
    start = load_file(model / "model.safetensors")
    for name, tensor in theirs.items():
        moved = (tensor - start[name]).norm()
        assert moved > 0 and (ours[name] - tensor).norm() < 0.02 * moved, name


@pytest.mark.timeout(300)
def test_two_ranks_step_skip_gather_and_restore_as_one(tmp_path):
    """tests/learner/dist/ranks_child.py says what is compared."""
    said = checked_by_ranks(str(tmp_path))
    assert said.count("same step") == 2 * len(CASES)
    for done in ("computed in bfloat16", "gathered", "restored"):
        assert said.count(done) == 2


@pytest.mark.timeout(300)
def test_a_step_in_bfloat16_is_the_same_with_torchrun_and_without():
    assert checked_by_ranks("bfloat16", ranks=1).count("computed in bfloat16") == 1


@pytest.mark.parametrize("sizes", [[], [5], [3, 3, 3], [9, 1, 8, 2, 7, 3], [100, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_hold_everything_once_and_are_about_equal(sizes, count):
    parts = balanced(sizes, count)
    assert len(parts) == count and parts == [sorted(part) for part in parts]
    assert sorted(i for part in parts for i in part) == [*range(len(sizes))]
    most = max(sum(sizes[i] for i in part) for part in parts)
    best = min(
        max(
            sum(size for size, at in zip(sizes, where, strict=True) if at == s)
            for s in range(count)
        )
        for where in product(range(count), repeat=len(sizes))
    )
    assert most <= 4 / 3 * best


def test_a_command_arrives_as_it_was_sent():
    trees = [tree_of(shape) for shape in SHAPES[:3]]
    command = Command.of(Command("step", {"version": 3, "updates": 2**40}, trees).parts())
    assert (command.name, command.facts) == ("step", {"version": 3, "updates": 2**40})
    for tree, received in zip(trees, command.trees, strict=True):
        received.validate()
        assert (received.prompt, received.unique_tokens) == (tree.prompt, tree.unique_tokens)
        assert sorted(received.rewards()) == sorted(tree.rewards())


@SOAK
@pytest.mark.timeout(300)
def test_a_signal_to_torchrun_ends_all_ranks_after_the_step(tmp_path, model):
    recording = record(model, 40 * PER_STEP, PER_STEP, seed=5)
    with RecordedServer(tmp_path, model, recording) as server:
        learner = Learner(server, model, *OPTIONS, "--checkpoint-every-steps=100")
        process = learner.start("--steps=30", ranks=2)
        server.after_calls(25, 0.0, process.terminate)
        assert ended(process) != 0  # torchrun's own, whatever its ranks return
        done = len(rows(learner))
        assert 0 < done < 30
        (folder,) = (learner.out_dir / "checkpoints").iterdir()
        assert folder.name == f"step-{done:08d}"
        assert acked(server) == upto(done) and "leased" not in server.trees().values()
        assert (learner.out_dir / "last" / "config.json").is_file()
        assert "ibtpo-learner:" not in learner.log.read_text()


@SOAK
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("limit_bytes", "what"), [(100_000, "checkpoint"), (8_000, "weights to publish")]
)
def test_a_full_disk_ends_all_ranks_with_one_message(tmp_path, model, limit_bytes, what):
    recording = record(model, 10 * PER_STEP, PER_STEP, seed=5)
    with RecordedServer(tmp_path, model, recording) as server:
        learner = Learner(server, model, *OPTIONS)
        assert learner.run_here("--steps=2") == ""
        assert ended(learner.start("--steps=4", ranks=2, largest_file=limit_bytes)) == 1
        said = [s for s in learner.log.read_text().splitlines() if s.startswith("ibtpo-learner:")]
        assert len(said) == 1 and "could not be written" in said[0] and what in said[0]
        folders = sorted(path.name for path in (learner.out_dir / "checkpoints").iterdir())
        assert folders == ["step-00000001", "step-00000002"]
        assert learner.run_here("--steps=4") == ""
        assert acked(server) == upto(4)


@SOAK
@pytest.mark.timeout(300)
def test_rank_0_may_be_quiet_for_longer_than_the_timeout():
    assert checked_by_ranks("quiet").count("gathered") == 2


@SOAK
@pytest.mark.timeout(300)
def test_a_rank_that_stalls_ends_the_run_after_the_timeout(tmp_path, model):
    recording = record(model, 40 * PER_STEP, PER_STEP, seed=5)
    with RecordedServer(tmp_path, model, recording) as server:
        learner = Learner(server, model, *OPTIONS, "--rank-timeout-s=12")
        process = learner.start("--steps=30", ranks=2)
        server.after_calls(25, 0.0, lambda: os.kill(rank_of(process, 1), signal.SIGSTOP))
        assert ended(process) == 1
        assert "rank 0 of 2: " in learner.log.read_text()
