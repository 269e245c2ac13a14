"""A run killed by SIGKILL at random moments ends in the same bytes as one that was not.

Both are real learner processes, fed by real queues from one recording; the trees are grown in
another order in each. IBTPO_SOAK=1 takes 40 steps and 10 kills.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from learner.io.checkpoint import Checkpoints
from learner.train.trainer import Trainer
from tests.learner.io.test_checkpoint import same
from tests.learner.recorded import RUN_ID, Learner, RecordedServer, record, write_model
from tests.learner.tiny import CPU, causal_lm, config

SOAK = os.environ.get("IBTPO_SOAK") == "1"
STEPS, KILLS = (40, 10) if SOAK else (6, 2)
PER_STEP = 4
OPTIONS = (
    f"--steps={STEPS}",
    f"--prompts-per-step={PER_STEP}",
    "--prompts-ahead-steps=1.5",
    "--optimizer-steps-per-batch=2",
    "--warmup-steps=5",
    "--old-logprobs=trainer",
    "--max-staleness=2",
    "--kl-weight=0.01",
    "--lr=1e-3",
)


def log(folder: Path) -> list[dict[str, Any]]:
    """What the run reported, without what the clock says."""
    timed = ("at_s", "pause_s", "learn_overhead_share")
    return [
        {k: v for k, v in json.loads(line).items() if k not in timed and "seconds" not in k}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def last_checkpoint(folder: Path) -> tuple[Trainer, dict[str, Any]]:
    trainer = Trainer(causal_lm(), None, config(), CPU)
    state = Checkpoints(folder / "checkpoints", 2).load(trainer.policy, trainer.optimizer)
    assert state
    # leases are named at random; which trees are in hand early depends on when they were grown
    return trainer, vars(state) | {"leases": None}


@pytest.mark.timeout(900 if SOAK else 240)
def test_killed_and_straight_are_the_same_run(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    recording = record(model, (STEPS + 3) * PER_STEP, PER_STEP)
    rng = random.Random(os.environ.get("IBTPO_SEED", "1"))
    with (
        RecordedServer(tmp_path / "straight", model, recording, seed=1) as quiet,
        RecordedServer(tmp_path / "killed", model, recording, seed=2) as server,
    ):
        straight, killed = Learner(quiet, model, *OPTIONS), Learner(server, model, *OPTIONS)
        beside = straight.start()
        try:
            for _ in range(KILLS):
                process = killed.start()
                calls = rng.randint(1, 6 * STEPS // (KILLS + 1))  # a step makes at least 7
                server.after_calls(calls, rng.uniform(0, 0.05), process.kill)
                assert process.wait(240) == -9, killed.log.read_text()
            assert killed.run().code == 0, killed.log.read_text()
            assert beside.wait(240) == 0, straight.log.read_text()
        finally:
            beside.kill()
        for site in (quiet, server):
            states = site.trees()
            done = {f"{RUN_ID}/{n}" for n in range(STEPS * PER_STEP)}
            assert {id_ for id_, state in states.items() if state == "acked"} == done
            assert set(states.values()) <= {"acked", "graded", "growing", "queued"}
    want = log(straight.out_dir)
    assert [row["step"] for row in want] == [*range(1, STEPS + 1)]
    assert sum(row["stale_trees"] for row in want) > 0
    assert sum(row["trained_trees"] for row in want) > STEPS * PER_STEP / 2
    assert log(killed.out_dir) == want
    (trainer, state), (other, expected) = map(last_checkpoint, (killed.out_dir, straight.out_dir))
    assert state == expected and state["updates"] > STEPS
    assert same(trainer, other)
    weights = "last/model.safetensors"
    assert (killed.out_dir / weights).read_bytes() == (straight.out_dir / weights).read_bytes()
    assert (killed.out_dir / weights).read_bytes() != (model / "model.safetensors").read_bytes()
