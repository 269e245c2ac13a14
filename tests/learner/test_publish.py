"""Which version a learner that starts gives the server, and what it pushes for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ibtree import Client
from ibtree.errors import PreconditionError
from learner.checkpoint import TrainState
from learner.model import load_policy
from learner.publish import Publisher
from tests.learner.recorded import RecordedServer, write_model
from tests.learner.tiny import CPU, causal_lm


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def publisher(tmp_path: Path, model: Path):
    with (
        RecordedServer(tmp_path / "server", model, []) as site,
        Client(site.target, timeout_s=20) as client,
    ):
        publisher = Publisher(client, model, tmp_path / "run", patience_s=20)
        publisher.updater = site.updater
        yield publisher


def policy(model: Path, version: int):
    """The weights that a run has as `version`; 0 is the model folder."""
    found = load_policy(model, CPU, "float32")
    with torch.no_grad():
        for weight in found.parameters():
            weight.add_(version / 8)
    return found


def serve(publisher: Publisher, model: Path, versions: int) -> TrainState:
    """Pushes versions 1 to `versions`; the state of the learner that did."""
    state = TrainState()
    for state.version in range(1, versions + 1):
        publisher.stage(policy(model, state.version), state)
        publisher.push()
    return state


def pushed(publisher: Publisher) -> list[int]:
    return publisher.updater._engine.updates


def test_a_new_run_on_a_new_server_pushes_nothing(publisher, model):
    state = TrainState()
    publisher.align(policy(model, 0), state)
    assert state.version == 0 and pushed(publisher) == []


def test_a_server_that_serves_these_weights_gets_nothing(publisher, model):
    state = serve(publisher, model, 2)
    resumed = TrainState(version=2, version_digest=state.version_digest)
    publisher.align(policy(model, 2), resumed)
    assert resumed == state and pushed(publisher) == [1, 2]


def test_the_version_that_a_kill_prevented_is_pushed_as_itself(publisher, model):
    """Killed between the checkpoint and the push: no version is left out or counted twice."""
    serve(publisher, model, 2)
    resumed = TrainState(version=3, version_digest="of the third")
    publisher.align(policy(model, 3), resumed)
    assert resumed.version == 3 and pushed(publisher) == [1, 2, 3]
    assert publisher.updater.serving.digest.hex() == resumed.version_digest


def test_a_server_that_is_ahead_gets_a_version_above(publisher, model):
    """The checkpoint is older than what was published: versions only grow."""
    serve(publisher, model, 3)
    resumed = TrainState(version=1)
    publisher.align(policy(model, 1), resumed)
    assert resumed.version == 4 and pushed(publisher) == [1, 2, 3, 4]


def test_weights_served_under_another_number_are_not_pushed_again(publisher, model):
    serve(publisher, model, 3)
    resumed = TrainState()
    publisher.align(policy(model, 3), resumed)
    assert resumed.version == 3 and pushed(publisher) == [1, 2, 3]


def test_the_staged_file_is_what_transformers_loads(publisher, model):
    state = TrainState(version=1)
    publisher.stage(policy(model, 1), state)
    with safe_open(publisher.staged, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        name = "model.norm.weight"
        assert torch.equal(file.get_tensor(name), policy(model, 1).state_dict()[name])


def test_a_server_of_another_model_is_refused(publisher, tmp_path):
    other = tmp_path / "other"
    causal_lm("Llama").save_pretrained(other)
    with pytest.raises(PreconditionError, match="give both the same model folder"):
        Publisher(publisher._client, other, tmp_path / "run", patience_s=20)
