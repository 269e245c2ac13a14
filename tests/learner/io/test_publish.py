"""What a learner pushes, when, and as what: whole or as a delta; which version it starts with."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ibtree import Client
from ibtree.client import RpcFailed
from ibtree.errors import PreconditionError
from learner.io.checkpoint import TrainState
from learner.io.publish import Publisher
from learner.train.model import load_policy
from tests.learner.recorded import RUN_ID, Learner, RecordedServer, record, write_model
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
        publisher.updater, publisher.site = site.updater, site
        yield publisher
        publisher.settle()


def policy(model: Path, version: int):
    """The weights that a run has as `version`; 0 is the model folder."""
    loaded = load_policy(model, CPU, "float32")
    with torch.no_grad():
        for weight in loaded.parameters():
            weight.add_(version / 8)
    return loaded


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


def nudged(model: Path, version: int):
    """A few elements differ from version to version, as at RL learning rates."""
    moved = policy(model, 1)
    with torch.no_grad():
        for weight in moved.parameters():
            weight.view(-1)[version % weight.numel()] += version
    return moved


def published(publisher: Publisher, model: Path, *versions: int) -> TrainState:
    state = TrainState()
    for state.version in versions:
        publisher.stage(nudged(model, state.version), state)
        publisher.push()
        weights = publisher.updater._engine.weights
        for name, tensor in nudged(model, state.version).state_dict().items():
            if name in weights:  # the head is tied to the embeddings
                assert torch.equal(weights[name], tensor)
        assert publisher.updater.serving.digest.hex() == state.version_digest
    return state


def bases(publisher: Publisher) -> list[int | None]:
    return [weights.base_version for weights in publisher.updater.retained]


def test_small_changes_go_as_deltas(publisher, model):
    published(publisher, model, 1, 2, 3)
    assert bases(publisher) == [None, 1, 2]
    sizes = [weights.file_bytes for weights in publisher.updater.retained]
    assert sizes[1] < sizes[0] / 5


def test_changes_of_everything_go_whole(publisher, model):
    state = TrainState()
    for state.version in (1, 2):
        anew = policy(model, 0)
        with torch.no_grad():
            for weight in anew.parameters():
                weight.normal_()
        publisher.stage(anew, state)
        publisher.push()
    assert bases(publisher) == [None, None]


def test_deltas_go_on_from_what_the_server_serves_already(publisher, model):
    published(publisher, model, 1, 2)
    again = Publisher(publisher._client, model, publisher.staged.parent, patience_s=20)
    again.updater = publisher.updater
    resumed = TrainState(version=2)
    again.align(nudged(model, 2), resumed)
    assert resumed.version == 2 and pushed(publisher) == [1, 2]
    published(again, model, 3)
    assert bases(publisher) == [None, 1, 2]


def test_a_server_that_lost_the_base_gets_the_whole_version(publisher, model, caplog):
    caplog.set_level("INFO")
    published(publisher, model, 1, 2)
    publisher.updater._host.version = None  # an update failed, and the old one can not be read
    published(publisher, model, 3)
    assert "pushing version 3 whole: base_version" in caplog.text
    published(publisher, model, 4)
    assert bases(publisher) == [None, 1, None, 3]


def test_after_a_rollback_the_next_push_is_refused_and_a_new_start_goes_on_above(publisher, model):
    """Whoever rolls back decides what is served; the learner does not undo it by itself."""
    published(publisher, model, 1, 2)
    assert publisher._client.rollback_weights().version == 3
    state = TrainState(version=3)
    publisher.stage(nudged(model, 3), state)
    with pytest.raises(RpcFailed, match="3 is not newer than the served 3"):
        publisher.push()
    again = Publisher(publisher._client, model, publisher.staged.parent, patience_s=20)
    resumed = TrainState(version=2)
    again.align(nudged(model, 2), resumed)
    assert resumed.version == 4 and pushed(publisher) == [1, 2, 3, 4]


@pytest.fixture
def hanging(publisher):
    """Updates hang until `release()`."""
    site = publisher.site
    site._loop.call_soon_threadsafe(publisher.updater._engine.half_way.clear)
    publisher.release = lambda: site._loop.call_soon_threadsafe(
        publisher.updater._engine.half_way.set
    )
    yield publisher
    publisher.release()


def test_a_push_in_the_background_is_waited_for_by_the_next_one(hanging, model):
    state = TrainState(version=1)
    hanging.stage(nudged(model, 1), state)
    hanging.push_later()
    release = threading.Timer(0.2, hanging.release)
    release.start()
    assert pushed(hanging) == [] and hanging.pause_s == 0.0
    state.version = 2
    hanging.stage(nudged(model, 2), state)  # writes the file that was being sent: not before
    assert pushed(hanging) == [1] and hanging.pause_s > 0.0
    hanging.push()
    assert pushed(hanging) == [1, 2] and bases(hanging) == [None, 1]
    release.join()


def test_a_push_that_fails_in_the_background_is_told_to_who_waits(publisher, model, caplog):
    published(publisher, model, 5)
    state = TrainState(version=4)
    publisher.stage(nudged(model, 4), state)
    publisher.push_later()
    with pytest.raises(RpcFailed, match="4 is not newer than the served 5"):
        publisher.stage(nudged(model, 6), state)
    publisher.stage(nudged(model, 4), state)
    publisher.push_later()
    publisher.settle()
    assert "4 is not newer" in caplog.text
    published(publisher, model, 6, 7)
    assert bases(publisher) == [None, None, 6]


def test_files_left_in_a_shared_folder(tmp_path, model):
    shared = tmp_path / "shared"
    shared.mkdir()
    with (
        RecordedServer(tmp_path / "server", model, [], shared_dir=shared) as site,
        Client(site.target, timeout_s=20) as client,
    ):
        publisher = Publisher(client, model, tmp_path / "run", 20, shared_dir=shared)
        publisher.updater = site.updater
        published(publisher, model, 1, 2)
        assert bases(publisher) == [None, 1] and not list(shared.iterdir())


def of_run(publisher: Publisher, run_id: str, **options: bool) -> Publisher:
    """The publisher of another run on the same server."""
    folder = publisher.staged.parent.with_name(run_id)
    model = publisher.site._model_dir
    other = Publisher(publisher._client, model, folder, 20, run_id=run_id, **options)
    other.updater = publisher.updater
    return other


def test_one_run_publishes_at_a_time(publisher, model):
    """Another one is told whose weights are served; if it takes over, the first one is told."""
    first = of_run(publisher, "first")
    published(first, model, 1, 2)
    state = TrainState()
    with pytest.raises(RpcFailed, match="run first published version 2"):
        of_run(publisher, "second").align(policy(model, 0), state)
    assert pushed(publisher) == [1, 2]
    second, state = of_run(publisher, "second", take_over=True), TrainState()
    second.align(policy(model, 0), state)
    assert state.version == 3 and pushed(publisher) == [1, 2, 3]
    published(second, model, 4)
    with pytest.raises(RpcFailed, match="run second published version 4"):
        published(first, model, 5)
    third = of_run(publisher, "third", take_over=True)
    third.align(nudged(model, 4), TrainState())
    published(third, model, 5)
    with pytest.raises(RpcFailed, match="run third published version 5"):
        published(second, model, 6)  # it took over once, not for ever


def test_a_learner_names_its_run(tmp_path, model):
    with RecordedServer(tmp_path / "server", model, record(model, 12, 4, seed=3)) as site:
        options = ("--prompts-per-step=4", "--kl-weight=0", "--steps=1")
        assert Learner(site, model, *options).run_here() == ""
        assert site.updater.retained[-1].run_id == RUN_ID
        other = Learner(site, model, *options, out_dir=tmp_path / "other")
        (tmp_path / "other" / "run.json").write_text('{"run_id": "other"}')
        said = other.run_here()
        assert f"run {RUN_ID} published version 1" in said and "--take-over true" in said
