"""Publishing beside training: what waits for a push; canaries and a server that computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ibtree.tree import Finish, Tree
from learner.io.canary import canary_of
from learner.train.model import load_policy
from learner.train.trainer import Trainer
from learner.tree.probe import enable_packed_attention
from tests.ibtree.tree.growing import step_of
from tests.learner.recorded import Learner, RecordedServer, record, write_model
from tests.learner.tiny import CPU

PER_STEP = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def site(tmp_path: Path, model: Path):
    with RecordedServer(tmp_path, model, record(model, 40, PER_STEP, seed=3)) as site:
        yield site


def new_learner(site: RecordedServer, model: Path, *options: str) -> Learner:
    common = (f"--prompts-per-step={PER_STEP}", "--kl-weight=0", "--lr=1e-3", "--steps=3")
    return Learner(site, model, *common, *options)


@pytest.mark.parametrize(
    ("options", "waits"),
    [((), False), (("--max-staleness=0",), True), (("--prompts-ahead-steps=0",), True)],
)
def test_a_step_waits_for_the_push_only_where_it_wants_its_trees(
    site, model, monkeypatch, options, waits
):
    """The first push hangs until the second step's trees are trained on, or until it is waited
    for: a learner that waited where it need not would never go on."""
    engine, step, seen = site.updater._engine, Trainer.step, []

    def release() -> None:
        site._loop.call_soon_threadsafe(engine.half_way.set)

    def noted(self, *arguments):
        seen.append(list(engine.updates))
        if len(seen) == 2:
            release()
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "step", noted)
    if not waits:
        site._loop.call_soon_threadsafe(engine.half_way.clear)
    assert new_learner(site, model, *options).run_here() == ""
    assert len(seen) == 3 and seen[0] == []
    assert seen[1] == ([1] if waits else [])
    assert engine.updates == [1, 2, 3] == engine.tried[::8], "each was tried out and serves"


def test_a_server_that_computes_something_else_stops_the_run(site, model):
    engine = site.updater._engine
    engine.off = 1.5
    said = new_learner(site, model).run_here()
    assert "FAILED_PRECONDITION: canary: version 1 gives token" in said
    assert site.updater.serving.version == 0 and engine.updates == [1, 0]
    assert new_learner(site, model, "--canary-tolerance=2").run_here() == ""
    assert site.updater.serving.version == 3 and engine.tried[-1] == 3
    count = len(engine.tried)
    assert new_learner(site, model, "--canary-tolerance=0", "--steps=4").run_here() == ""
    assert site.updater.serving.version == 4 and len(engine.tried) == count


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 5, 30])
def test_a_canary_is_what_the_whole_model_gives(model, packed, length):
    policy = load_policy(model, CPU, "float32")
    tree = Tree(prompt=(1, 2, 3))
    tree.insert(0, [step_of(tuple(range(4, 4 + length)))], 1.0, Finish.STOP)
    with torch.no_grad():
        ids = torch.tensor([[1, 2, 3, *range(4, 4 + length)]])
        logp = torch.log_softmax(policy(input_ids=ids).logits[0], -1)
    if packed:
        enable_packed_attention(policy)
    canary = canary_of(policy, tree, 0.5, torch.float32)
    scored = min(length, 8)
    assert canary.token_ids == tuple(ids[0, : 3 + scored].tolist()) and canary.tolerance == 0.5
    want = [float(logp[at - 1, ids[0, at]]) for at in range(3, 3 + scored)]
    assert canary.logprobs == pytest.approx(want, abs=1e-4)


def test_a_canary_is_of_the_weights_as_they_are_published(model):
    """What bfloat16 rounds away is not served: masters moved by less than that give the same."""
    policy = load_policy(model, CPU, "float32")
    with torch.no_grad():
        for weight in policy.parameters():
            weight.copy_(weight.bfloat16())
    tree = Tree(prompt=(1, 2, 3))
    tree.insert(0, [step_of((4, 5, 6))], 1.0, Finish.STOP)
    served = canary_of(policy, tree, 0.5, torch.bfloat16).logprobs
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1 + 2**-10)  # half of what would make it round to another number
    assert canary_of(policy, tree, 0.5, torch.bfloat16).logprobs == served
    assert canary_of(policy, tree, 0.5, torch.float32).logprobs != pytest.approx(served, abs=1e-4)


def test_the_pause_of_a_push_is_in_the_next_steps_row(site, model):
    learner = new_learner(site, model, "--max-staleness=0")
    assert learner.run_here() == ""
    lines = map(json.loads, (learner.out_dir / "metrics.jsonl").read_text().splitlines())
    pauses = [row["pause_s"] for row in lines if row["kind"] == "step"]
    assert pauses[0] == 0.0 and all(pause > 0 for pause in pauses[1:])
