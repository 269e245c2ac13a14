"""The learner's side of the tree queue, against a queue in memory with a clock of its own."""

from __future__ import annotations

import json

import grpc
import pytest

from ibtree.client import RpcFailed
from ibtree.messages import TreeLease
from ibtree.options import options_from
from ibtree.questions import Question
from learner.checkpoint import TrainState
from learner.intake import Intake, QueueDry
from learner.prompts import PromptStream
from tests.learner.fake_queue import Queue
from tests.learner.tiny import config

QUESTIONS = [Question(f"q{i}", str(i)) for i in range(6)]


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A function from a queue, a state and options to an Intake on the queue's clock."""

    def build(queue: Queue, state: TrainState | None = None, **options) -> Intake:
        monkeypatch.setattr("learner.intake.time", queue)
        chosen = config(**{"prompts_per_step": 3, "out_dir": tmp_path, "lease_s": 60.0, **options})
        stream = PromptStream(QUESTIONS, 0, "run")
        return Intake(queue, stream, chosen, TrainState() if state is None else state)

    return build


def ids(leases: list[TreeLease]) -> list[str]:
    return [one.tree.tree_id for one in leases]


def noted(folder) -> list[str]:
    return json.loads((folder / "leases.json").read_text())


def test_prompts_are_submitted_ahead_and_once(make):
    queue, state = Queue(), TrainState()
    intake = make(queue, state, prompts_ahead_steps=1.5)
    for step, until in [(0, 8), (0, 8), (1, 10), (2, 14)]:
        intake.submit_ahead(step)
        assert queue.submitted == [f"run/{n}" for n in range(until)]
        assert state.next_prompt == until
    resumed = make(queue, TrainState(next_prompt=3), prompts_ahead_steps=0)
    resumed.submit_ahead(3)  # from the checkpoint's position: known ids are no new prompts
    assert queue.submitted == [f"run/{n}" for n in range(14)]


def test_many_prompts_go_in_several_calls(make):
    queue, sizes = Queue(), []
    submit = queue.submit_prompts
    queue.submit_prompts = lambda prompts, wait: (
        sizes.append(len(prompts)),
        submit(prompts, wait=wait),
    )
    make(queue, prompts_per_step=1250).submit_ahead(0)
    assert sizes == [1000, 1000, 500] and len(queue.submitted) == 2500


def test_a_step_is_leased_noted_and_acked(make, tmp_path):
    queue, state = Queue(), TrainState()
    intake = make(queue, state)
    intake.submit_ahead(0)
    leases = intake.lease_step()
    assert ids(leases) == ["run/0", "run/1", "run/2"]
    assert noted(tmp_path) == [one.lease_id for one in leases]
    state.trained += ids(leases)
    intake.ack()
    assert queue.acked == ["run/0", "run/1", "run/2"]
    assert state.trained == [] and noted(tmp_path) == []
    assert ids(intake.lease_step()) == ["run/3", "run/4", "run/5"]


def test_trees_in_the_ledger_are_acked_and_not_trained_on_again(make):
    queue, state = Queue(), TrainState(trained=["run/1", "run/3", "run/9"])
    intake = make(queue, state)
    intake.submit_ahead(0)
    leases = intake.lease_step()
    assert ids(leases) == ["run/0", "run/2", "run/4"]
    state.trained += ids(leases)
    intake.ack()
    assert sorted(queue.acked) == [f"run/{n}" for n in range(5)]
    assert state.trained == ["run/9"]


def test_leases_in_hand_are_prolonged(make):
    queue = Queue()
    intake = make(queue)
    intake.submit_ahead(0)
    leases = intake.lease_step()
    for _ in range(12):
        queue.sleep(25)
        intake.keep_alive()
    assert set(queue.leases) == {one.lease_id for one in leases}


def test_leases_that_ran_out_stay_in_the_ledger_until_they_come_back(make):
    """Trained on, not acked in time: the tree comes again and is acked then, untrained."""
    queue, state = Queue(), TrainState()
    intake = make(queue, state)
    intake.submit_ahead(0)
    state.trained += ids(intake.lease_step())
    queue.sleep(61)
    intake.ack()
    assert queue.acked == [] and state.trained == ["run/0", "run/1", "run/2"]
    again = intake.lease_step()
    assert ids(again) == ["run/3", "run/4", "run/5"]
    queue.graded.sort()
    intake.submit_ahead(1)
    state.trained += ids(again) + ids(intake.lease_step())
    intake.ack()
    assert state.trained == []
    assert sorted(queue.acked) == [f"run/{n}" for n in range(9)]


def test_leases_that_ran_out_before_the_step_are_not_trained_on(make):
    """A first tree waits for the others until its lease is over: the batch starts again."""
    queue = Queue(dying={1, 2, 3, 4, 5})
    intake = make(queue, prompts_ahead_steps=0, patience_s=1000.0)
    intake.submit_ahead(0)
    lease = queue.lease_trees

    def slow(max_trees, **rest):
        found = lease(max_trees, **rest)
        if max_trees < 3:
            queue.sleep(61)  # the server was away
            queue.lease_trees = lease
            queue.graded += ["run/6", "run/7"]
        return found

    queue.lease_trees = slow
    leases = intake.lease_step()
    assert sorted(ids(leases)) == ["run/0", "run/6", "run/7"]
    assert all(one.lease_id in queue.leases for one in leases)


def test_a_partial_batch_when_prompts_died(make):
    queue = Queue(dying={1})
    intake = make(queue, prompts_ahead_steps=0)
    intake.submit_ahead(0)
    assert ids(intake.lease_step()) == ["run/0", "run/2"]


def test_nothing_within_patience_is_an_error(make):
    queue = Queue(dying={0, 1, 2})
    intake = make(queue, prompts_ahead_steps=0, patience_s=100.0)
    intake.submit_ahead(0)
    with pytest.raises(QueueDry, match=r"100\.0 s"):
        intake.lease_step()
    assert 100 <= queue.now <= 110


def test_an_ack_that_fails_otherwise_ends_the_run_and_keeps_the_ledger(make):
    queue, state = Queue(), TrainState()
    intake = make(queue, state)
    intake.submit_ahead(0)
    state.trained += ids(intake.lease_step())
    queue.fail["AckTrees"] = grpc.StatusCode.UNAVAILABLE
    with pytest.raises(RpcFailed):
        intake.ack()
    assert state.trained == ["run/0", "run/1", "run/2"]


def test_a_restart_gives_back_what_the_killed_run_held(make, tmp_path):
    queue = Queue()
    killed = make(queue)
    killed.submit_ahead(0)
    held = ids(killed.lease_step())
    ran_out = next(iter(queue.leases))
    queue.graded.append(queue.leases.pop(ran_out)[0])
    make(queue).give_back_from_before()
    assert queue.nacked == held[1:] and queue.leases == {}
    assert not (tmp_path / "leases.json").exists()
    make(queue).give_back_from_before()  # nothing noted: nothing to do


def test_stopping_gives_everything_back(make, tmp_path):
    queue = Queue()
    intake = make(queue)
    intake.submit_ahead(0)
    held = ids(intake.lease_step())
    intake.give_back("stop")
    assert queue.nacked == held and noted(tmp_path) == []
    queue.fail["NackTrees"] = grpc.StatusCode.UNAVAILABLE
    intake.lease_step()
    intake.give_back("stop")  # a server that is away does not stop the learner from stopping


def test_tree_options_are_the_runs():
    options = options_from(config(strategy="independent", rounds=3, beta=2.0, max_new_tokens=77))
    assert (options.strategy, options.rounds, options.beta) == ("independent", 3, 2.0)
    assert options.sampling.max_new_tokens == 77 and options.sampling.top_k == 20
