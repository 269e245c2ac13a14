"""Checkpoints: exact round trips, kills in between, damage, a full disk, what is kept."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from ibtree.errors import FieldError, PreconditionError
from learner.config import LearnerConfig
from learner.errors import WriteError
from learner.io.checkpoint import Checkpoints, TrainState
from learner.run import run_id_of
from learner.train.trainer import Trainer
from tests.learner.tiny import CPU, causal_lm, config, mixed_batch

TREES = [[pair.fast for pair in mixed_batch(random.Random(seed))] for seed in range(4)]


FILES = {".metadata", "__0_0.distcp", "state.json", "digests.json"}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def new_trainer(seed: int, **model) -> Trainer:
    return Trainer(causal_lm(seed=seed, **model), None, config(lr=1e-2, weight_decay=0.1), CPU)


def advance(trainer: Trainer, steps: range) -> list[float]:
    """Losses of these steps; each also draws from torch's generator, and trains on the draw."""
    losses = []
    for number in steps:
        losses.append(trainer.step(TREES[number], version=0).loss)
        with torch.no_grad():
            next(trainer.policy.parameters())[0, :4] += torch.rand(4)
    return losses


def same(a: Trainer, b: Trainer) -> bool:
    """Weights and optimiser, byte for byte."""
    weights = zip(a.policy.state_dict().values(), b.policy.state_dict().values(), strict=True)
    mine, theirs = a.optimizer.state_dict(), b.optimizer.state_dict()
    moments = [
        (mine["state"][i][key], theirs["state"][i][key])
        for i in mine["state"]
        for key in ("step", "exp_avg", "exp_avg_sq")
    ]
    groups = mine["param_groups"] == theirs["param_groups"]
    return groups and bool(moments) and all(torch.equal(x, y) for x, y in [*weights, *moments])


def test_a_round_trip_restores_everything(tmp_path):
    trainer, fresh = new_trainer(1), new_trainer(2)
    advance(trainer, range(2))
    state = TrainState(
        step=2,
        version=5,
        version_digest="ab12",
        updates=4,
        bad_steps=1,
        prompts_done=32,
        next_prompt=64,
        tokens=123456789,
        trained=["run/1", "run/ü"],
        leases={"lease-1": "run/3"},
        figures={"loss": 0.1},
    )
    Checkpoints(tmp_path, 2).save(trainer.policy, trainer.optimizer, state)
    drawn = torch.rand(3)
    torch.rand(100)
    loaded = Checkpoints(tmp_path, 2).load(fresh.policy, fresh.optimizer)
    assert loaded == state and loaded.trained == ["run/1", "run/ü"]
    assert same(trainer, fresh)
    assert torch.equal(torch.rand(3), drawn)


def test_training_goes_on_bit_for_bit(tmp_path):
    torch.manual_seed(7)
    straight = new_trainer(1)
    want = advance(straight, range(4))

    torch.manual_seed(7)
    first = new_trainer(1)
    losses = advance(first, range(2))
    Checkpoints(tmp_path, 1).save(first.policy, first.optimizer, TrainState(step=2))

    torch.manual_seed(99)
    second = new_trainer(3)
    state = Checkpoints(tmp_path, 1).load(second.policy, second.optimizer)
    losses += advance(second, range(state.step, 4))
    assert losses == want
    assert same(second, straight)


def test_nothing_to_load(tmp_path):
    trainer = new_trainer(1)
    assert Checkpoints(tmp_path / "new", 1).load(trainer.policy, trainer.optimizer) is None


def test_only_the_newest_are_kept(tmp_path):
    trainer, checkpoints = new_trainer(1), Checkpoints(tmp_path, 2)
    for step in (8, 9, 10, 11):
        checkpoints.save(trainer.policy, trainer.optimizer, TrainState(step=step))
    assert names(tmp_path) == ["step-00000010", "step-00000011"]
    assert checkpoints.load(trainer.policy, trainer.optimizer).step == 11


def test_a_run_that_must_not_resume_refuses_a_used_folder(tmp_path):
    trainer = new_trainer(1)
    Checkpoints(tmp_path / "checkpoints", 2).save(
        trainer.policy, trainer.optimizer, TrainState(step=10)
    )
    config = LearnerConfig.load(
        "prog", ["--model=m", "--prompts=p", "--resume=never", f"--out-dir={tmp_path}"]
    )
    with pytest.raises(FieldError, match="out_dir"):
        run_id_of(Checkpoints(tmp_path / "checkpoints", 2), config)
    assert not (tmp_path / "run.json").exists(), "the other run's name would be lost"


@pytest.mark.parametrize("when", ["weights", "state", "rename"])
def test_a_kill_while_saving_keeps_the_checkpoint_before(tmp_path, monkeypatch, when):
    trainer, fresh = new_trainer(1), new_trainer(2)
    advance(trainer, range(1))
    Checkpoints(tmp_path, 1).save(trainer.policy, trainer.optimizer, TrainState(step=1))
    saved = new_trainer(1)
    Checkpoints(tmp_path, 1).load(saved.policy, saved.optimizer)
    advance(trainer, range(1, 2))

    rename = Path.rename

    def die(*paths: object, **_: object) -> Path:
        if when == "rename" and paths[0].name == ".metadata.tmp":  # torch's own
            return rename(*paths)
        raise KeyboardInterrupt

    target = {
        "weights": "learner.dist.state.save",
        "state": "pathlib.Path.write_text",
        "rename": "pathlib.Path.rename",
    }[when]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(target, die)
        Checkpoints(tmp_path, 1).save(trainer.policy, trainer.optimizer, TrainState(step=2))
    assert names(tmp_path) == ["step-00000001", "step-00000002.part"]

    again = Checkpoints(tmp_path, 1)
    assert names(tmp_path) == ["step-00000001"]
    assert again.load(fresh.policy, fresh.optimizer).step == 1
    assert same(saved, fresh)
    again.save(trainer.policy, trainer.optimizer, TrainState(step=2))
    assert again.load(fresh.policy, fresh.optimizer).step == 2


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", sorted(FILES))
def test_a_damaged_checkpoint_is_kept_aside_and_the_one_before_counts(tmp_path, caplog, harm, name):
    trainer, want, fresh = new_trainer(1), new_trainer(1), new_trainer(2)
    for step in (1, 2, 3):
        advance(trainer, range(step, step + 1))
        Checkpoints(tmp_path, 3).save(trainer.policy, trainer.optimizer, TrainState(step=step))
        if step == 1:
            Checkpoints(tmp_path, 3).load(want.policy, want.optimizer)
    for damaged in ("step-00000002", "step-00000003"):
        harm(tmp_path / damaged / name)
    state = Checkpoints(tmp_path, 3).load(fresh.policy, fresh.optimizer)
    assert state == TrainState(step=1) and same(fresh, want)
    folders = ["step-00000001", "step-00000002.damaged", "step-00000003.damaged"]
    assert names(tmp_path) == folders
    assert caplog.text.count("is damaged") == 2 and "step-00000003" in caplog.text
    again = Checkpoints(tmp_path, 1)
    assert again.load(trainer.policy, trainer.optimizer) == state
    again.save(trainer.policy, trainer.optimizer, TrainState(step=2))
    assert names(tmp_path) == ["step-00000002", *folders[1:]]


def test_a_checkpoint_damaged_again_is_kept_beside_the_first(tmp_path):
    trainer = new_trainer(1)
    for _ in range(2):
        for step in (1, 2):
            Checkpoints(tmp_path, 2).save(trainer.policy, trainer.optimizer, TrainState(step=step))
        truncate(tmp_path / "step-00000002" / "state.json")
        Checkpoints(tmp_path, 2).load(trainer.policy, trainer.optimizer)
        shutil.rmtree(tmp_path / "step-00000001")
    assert names(tmp_path) == ["step-00000002.damaged", "step-00000002.damaged1"]


def test_without_a_whole_checkpoint_nothing_starts_anew(tmp_path):
    trainer = new_trainer(1)
    Checkpoints(tmp_path, 2).save(trainer.policy, trainer.optimizer, TrainState(step=1))
    truncate(tmp_path / "step-00000001" / "state.json")
    for _ in range(2):
        with pytest.raises(PreconditionError, match=r"no checkpoint .* is whole"):
            Checkpoints(tmp_path, 2).load(trainer.policy, trainer.optimizer)
    assert names(tmp_path) == ["step-00000001"]


def test_before_its_first_step_the_optimiser_has_no_state(tmp_path):
    """torch's own helper would have it take an empty step, which counts in Adam's corrections."""
    trainer, fresh = new_trainer(1), new_trainer(2)
    Checkpoints(tmp_path, 1).save(trainer.policy, trainer.optimizer, TrainState(step=1))
    assert not trainer.optimizer.state
    advance(fresh, range(1))
    Checkpoints(tmp_path, 1).load(fresh.policy, fresh.optimizer)
    assert not fresh.optimizer.state
    assert advance(fresh, range(1)) == advance(trainer, range(1))


def save_with_little_room(folder: str) -> None:
    """Run in a process of its own: a limit of the operating system on the size of a file."""
    import resource

    trainer = new_trainer(1)
    advance(trainer, range(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        Checkpoints(Path(folder), 1).save(trainer.policy, trainer.optimizer, TrainState(step=2))
    except WriteError as error:
        sys.exit(f"stopped: {error}")


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path):
    trainer = new_trainer(1)
    Checkpoints(tmp_path, 1).save(trainer.policy, trainer.optimizer, TrainState(step=1))
    code = f"from {__name__} import *; save_with_little_room({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "stopped: the checkpoint of step 2 could not be written" in done.stderr
    assert "File too large" in done.stderr
    assert names(tmp_path) == ["step-00000001"]
    assert Checkpoints(tmp_path, 1).load(trainer.policy, trainer.optimizer).step == 1


def test_durable_before_it_is_named(tmp_path, monkeypatch):
    """Every file and the folder are synced before the rename, the parent after it."""
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note_sync(handle: int) -> None:
        done.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    def note_rename(self: Path, target: Path) -> Path:
        done.append(f"{self.name} named")
        return rename(self, target)

    monkeypatch.setattr("os.fsync", note_sync)
    monkeypatch.setattr("pathlib.Path.rename", note_rename)
    trainer = new_trainer(1)
    Checkpoints(tmp_path, 1).save(trainer.policy, trainer.optimizer, TrainState(step=3))
    assert set(done[-7:-3]) == FILES
    part = "step-00000003.part"
    assert done[-3:] == [part, f"{part} named", tmp_path.name]


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_saved_once(tmp_path, tied):
    trainer, fresh = new_trainer(1, tied=tied), new_trainer(2, tied=tied)
    advance(trainer, range(1))
    Checkpoints(tmp_path, 1).save(trainer.policy, trainer.optimizer, TrainState(step=1))
    stored = FileSystemReader(tmp_path / "step-00000001").read_metadata().state_dict_metadata
    weights = {name for name in stored if name.startswith("model.")}
    assert ("model.lm_head.weight" in weights) == (not tied)
    assert len(weights) == len(list(trainer.policy.parameters()))
    Checkpoints(tmp_path, 1).load(fresh.policy, fresh.optimizer)
    assert same(trainer, fresh)
    head, embedding = fresh.policy.lm_head.weight, fresh.policy.model.embed_tokens.weight
    assert (head.data_ptr() == embedding.data_ptr()) == tied


@pytest.mark.parametrize("kinds", [("Qwen2", "Llama"), ("Llama", "Qwen2")])
def test_a_checkpoint_of_another_model_is_refused(tmp_path, kinds):
    """Llama has none of the biases that Qwen2 has: names too many, then names missing."""
    saved, other = (Trainer(causal_lm(kind), None, config(), CPU) for kind in kinds)
    Checkpoints(tmp_path, 1).save(saved.policy, saved.optimizer, TrainState(step=1))
    with pytest.raises(PreconditionError, match="step-00000001"):
        Checkpoints(tmp_path, 1).load(other.policy, other.optimizer)
