"""The learner's side of the tree queue, against a queue in memory with a clock of its own."""

from __future__ import annotations

import json

import grpc
import pytest

from ibtree.client import RpcFailed
from ibtree.data.questions import Question
from ibtree.messages import TreeLease
from ibtree.tree.options import options_from
from learner.errors import QueueDry
from learner.io.checkpoint import TrainState
from learner.io.leases import TreeLeases
from learner.io.prompts import PromptStream
from tests.learner.io.fake_queue import Queue
from tests.learner.tiny import config

QUESTIONS = [Question(f"q{i}", str(i)) for i in range(6)]


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A function from a queue, a state and options to TreeLeases on the queue's clock."""

    def build(
        queue: Queue,
        state: TrainState | None = None,
        tree_problem=lambda _: "",
        stop=(),
        prepare=lambda _: None,
        **options,
    ) -> TreeLeases:
        monkeypatch.setattr("learner.io.leases.time", queue)
        chosen = config(**{"prompts_per_step": 3, "out_dir": tmp_path, "lease_s": 60.0, **options})
        stream = PromptStream(QUESTIONS, 0, "run")
        state = TrainState() if state is None else state
        return TreeLeases(queue, stream, chosen, state, tree_problem, prepare, stop)

    return build


def ids(leases: list[TreeLease]) -> list[str]:
    return [lease.tree.tree_id for lease in leases]


def noted(folder) -> dict[str, str]:
    return json.loads((folder / "leases.json").read_text())


def step(tree_leases: TreeLeases) -> list[str]:
    """What the loop does with the queue in a step; ids of the trees trained on."""
    tree_leases.submit_ahead()
    leases = tree_leases.lease_step()
    tree_leases.settle(leases)
    tree_leases.ack()
    return ids(leases)


def test_prompts_are_submitted_ahead_and_once(make):
    queue, state = Queue(), TrainState()
    tree_leases = make(queue, state, prompts_ahead_steps=1.5)
    for done, until in [(0, 8), (0, 8), (3, 11), (6, 14)]:
        state.prompts_done = done
        tree_leases.submit_ahead()
        assert queue.submitted == [f"run/{n}" for n in range(until)]
        assert state.next_prompt == until
    resumed = make(queue, TrainState(next_prompt=3, prompts_done=9), prompts_ahead_steps=0)
    resumed.submit_ahead()  # from the checkpoint's position: known ids are no new prompts
    assert queue.submitted == [f"run/{n}" for n in range(14)]


def test_many_prompts_go_in_several_calls(make):
    queue, sizes = Queue(), []
    submit = queue.submit_prompts
    queue.submit_prompts = lambda prompts, **how: (
        sizes.append(len(prompts)),
        submit(prompts, **how),
    )
    make(queue, prompts_per_step=1250).submit_ahead()
    assert sizes == [1000, 1000, 500] and len(queue.submitted) == 2500


def test_prompts_wait_for_room_as_long_as_the_patience_lasts(make):
    queue = Queue()
    queue.full_s = 1000.0
    make(queue, patience_s=1001.0).submit_ahead()
    assert len(queue.submitted) == 6
    with pytest.raises(RpcFailed, match="full"):
        make(queue, patience_s=999.0).submit_ahead()


def test_told_to_stop_it_waits_no_longer(make):
    queue = Queue(dying={1})
    stop: list[int] = []
    lease = queue.lease_trees
    queue.lease_trees = lambda *args, **how: (stop.append(15), lease(*args, **how))[1]
    tree_leases = make(queue, stop=stop)
    tree_leases.submit_ahead()
    assert ids(tree_leases.lease_step()) == ["run/0", "run/2"] and not queue.now


def test_a_step_is_leased_noted_and_acked(make, tmp_path):
    queue, state = Queue(), TrainState()
    tree_leases = make(queue, state)
    tree_leases.submit_ahead()
    leases = tree_leases.lease_step()
    assert ids(leases) == ["run/0", "run/1", "run/2"]
    assert noted(tmp_path) == {lease.lease_id: lease.tree.tree_id for lease in leases}
    tree_leases.settle(leases)
    assert state.trained == ids(leases)
    tree_leases.ack()
    assert queue.acked == ["run/0", "run/1", "run/2"]
    assert state.trained == [] and noted(tmp_path) == {}
    tree_leases.submit_ahead()
    assert ids(tree_leases.lease_step()) == ["run/3", "run/4", "run/5"]


def test_the_trees_of_a_step_are_those_of_its_prompts_in_order(make):
    """Whatever order they are graded in; early ones wait in hand, and are not acked."""
    queue, state = Queue(), TrainState()
    tree_leases = make(queue, state, prompts_ahead_steps=2)
    tree_leases.submit_ahead()
    queue.graded = [f"run/{n}" for n in (7, 2, 5, 0, 8, 1, 3, 6, 4)]
    assert step(tree_leases) == ["run/0", "run/1", "run/2"]
    assert sorted(state.leases.values()) == ["run/5", "run/7", "run/8"]
    assert queue.acked == ["run/2", "run/0", "run/1"] and state.trained == []
    assert step(tree_leases) == ["run/3", "run/4", "run/5"]
    assert step(tree_leases) == ["run/6", "run/7", "run/8"]
    assert sorted(queue.acked) == [f"run/{n}" for n in range(9)]


def test_trees_in_the_ledger_are_acked_and_not_trained_on_again(make):
    queue = Queue()
    queue.submitted = queue.graded = [f"run/{n}" for n in range(6)]
    state = TrainState(prompts_done=3, trained=["run/1", "run/2", "run/9"])
    tree_leases = make(queue, state)
    assert step(tree_leases) == ["run/3", "run/4", "run/5"]
    # run/0 came after its step was over: nobody knows it as trained on, and it is not
    assert sorted(queue.acked) == [f"run/{n}" for n in range(6)]
    assert state.trained == ["run/9"]


def test_a_restart_acks_what_is_in_the_ledger(make, tmp_path):
    queue, state = Queue(), TrainState()
    killed = make(queue, state)
    killed.submit_ahead()
    leases = killed.lease_step()
    assert ids(leases) == ["run/0", "run/1", "run/2"]
    resumed = TrainState(prompts_done=3, trained=ids(leases), leases=dict(state.leases))
    (tmp_path / "leases.json").write_text("")  # cut off by a power failure
    make(queue, resumed).give_back_from_before()
    assert sorted(queue.acked) == ids(leases)
    assert resumed == TrainState(prompts_done=3)


def test_leases_in_hand_are_prolonged(make):
    queue = Queue()
    tree_leases = make(queue)
    tree_leases.submit_ahead()
    leases = tree_leases.lease_step()
    for _ in range(12):
        queue.sleep(25)
        tree_leases.keep_alive()
    assert set(queue.leases) == {lease.lease_id for lease in leases}


def test_leases_that_ran_out_stay_in_the_ledger_until_they_come_back(make):
    """Trained on, not acked in time: the tree comes again and is acked then, untrained."""
    queue, state = Queue(), TrainState()
    tree_leases = make(queue, state)
    tree_leases.submit_ahead()
    tree_leases.settle(tree_leases.lease_step())
    queue.sleep(61)
    tree_leases.ack()
    assert queue.acked == [] and state.trained == ["run/0", "run/1", "run/2"]
    queue.graded.sort()
    assert step(tree_leases) == ["run/3", "run/4", "run/5"]
    assert state.trained == []
    assert sorted(queue.acked) == [f"run/{n}" for n in range(6)]


def test_leases_that_ran_out_before_the_step_are_not_trained_on(make):
    """A first tree waits for the others until its lease is over: the batch starts again."""
    queue = Queue(dying={1, 2})
    tree_leases = make(queue, prompts_ahead_steps=0, patience_s=1000.0)
    tree_leases.submit_ahead()
    lease = queue.lease_trees

    def slow(max_trees, **rest):
        leases = lease(max_trees, **rest)
        if max_trees < 3:
            queue.sleep(61)  # the server was away
            queue.lease_trees = lease
            queue.graded += ["run/2", "run/1"]
        return leases

    queue.lease_trees = slow
    leases = tree_leases.lease_step()
    assert ids(leases) == ["run/0", "run/1", "run/2"]
    assert all(lease.lease_id in queue.leases for lease in leases)


def test_a_partial_batch_when_prompts_died(make):
    queue = Queue(dying={1})
    tree_leases = make(queue, prompts_ahead_steps=0)
    tree_leases.submit_ahead()
    assert ids(tree_leases.lease_step()) == ["run/0", "run/2"]


def test_a_step_whose_prompts_all_died_is_passed_over(make):
    queue, state = Queue(dying={0, 1, 2, 4}), TrainState()
    assert step(make(queue, state, prompts_ahead_steps=0)) == ["run/3", "run/5"]
    assert state.prompts_done == 6 and queue.submitted == [f"run/{n}" for n in range(6)]


def test_nothing_within_patience_is_an_error(make):
    queue = Queue(dying=set(range(1000)))
    tree_leases = make(queue, prompts_ahead_steps=0, patience_s=100.0)
    tree_leases.submit_ahead()
    with pytest.raises(QueueDry, match=r"100\.0 s"):
        tree_leases.lease_step()
    assert 100 <= queue.now <= 110


def test_a_tree_that_can_not_be_trained_on_is_refused_and_the_loop_goes_on(make):
    """One broken on the wire, or refused by the learner: nacked as bad with the reason, until the
    server gives it up; the others are trained on, and those of other runs left alone."""
    queue = Queue()
    queue.graded, queue.problems = ["other/1", "plain"], {"run/0": "tree.parents: not in order"}
    prepared: set[str] = set()
    tree_leases = make(
        queue,
        tree_problem=lambda tree: "too odd" * (tree.tree_id == "run/4"),
        prepare=lambda tree: prepared.add(tree.tree_id),
    )
    tree_leases.submit_ahead()
    first = tree_leases.lease_step()
    assert ids(first) == ["run/1", "run/2"]
    assert {"run/1", "run/2"} <= prepared <= {"run/1", "run/2", "run/3", "run/5"}
    assert tree_leases.refused == {"run/0", "run/4"}
    tree_leases.settle(first)
    tree_leases.ack()
    assert step(tree_leases) == ["run/3", "run/5"]
    assert queue.dead == {
        "run/0": "tree.parents: not in order",
        "run/4": "too odd",
    }
    assert queue.graded == ["other/1", "plain"]


def test_restarts_of_a_learner_give_its_trees_back_and_kill_none(make):
    """However often: only what is wrong with a tree itself counts against it."""
    queue = Queue()
    for _ in range(6):
        killed = make(queue)
        killed.submit_ahead()
        assert ids(killed.lease_step()) == ["run/0", "run/1", "run/2"]
        make(queue).give_back_from_before()
    assert queue.dead == {} and queue.bad == [] and len(queue.nacked) >= 18


def test_a_dead_prompt_is_not_waited_for_while_another_run_has_trees(make):
    queue = Queue(dying={1})
    queue.graded = [f"other/{n}" for n in range(50)]
    tree_leases = make(queue, prompts_ahead_steps=0)
    tree_leases.submit_ahead()
    assert ids(tree_leases.lease_step()) == ["run/0", "run/2"]
    assert queue.now < 60 and len(queue.graded) == 50


def test_an_ack_that_fails_otherwise_ends_the_run_and_keeps_the_ledger(make):
    queue, state = Queue(), TrainState()
    tree_leases = make(queue, state)
    tree_leases.submit_ahead()
    tree_leases.settle(tree_leases.lease_step())
    queue.fail["AckTrees"] = grpc.StatusCode.UNAVAILABLE
    with pytest.raises(RpcFailed):
        tree_leases.ack()
    assert state.trained == ["run/0", "run/1", "run/2"]


def test_a_restart_gives_back_what_the_killed_run_held(make, tmp_path):
    queue = Queue()
    killed = make(queue)
    killed.submit_ahead()
    leased = ids(killed.lease_step())
    ran_out = next(iter(queue.leases))
    queue.graded.append(queue.leases.pop(ran_out)[0])
    make(queue).give_back_from_before()
    assert queue.nacked == leased[1:] and queue.leases == {}
    assert noted(tmp_path) == {}
    make(queue).give_back_from_before()  # nothing noted: nothing to do


def test_stopping_gives_everything_back(make, tmp_path):
    queue = Queue()
    tree_leases = make(queue)
    tree_leases.submit_ahead()
    leased = ids(tree_leases.lease_step())
    tree_leases.give_back("stop")
    assert queue.nacked == leased and noted(tmp_path) == {}
    queue.fail["NackTrees"] = grpc.StatusCode.UNAVAILABLE
    asked = queue.calls["NackTrees"]
    assert len(tree_leases.lease_step()) > 1
    tree_leases.give_back("stop")  # a server that is away does not stop the learner from stopping
    assert queue.calls["NackTrees"] == asked + 1, "nor hold it up for every lease"
    assert noted(tmp_path) == {}


def test_tree_options_are_the_runs():
    options = options_from(config(strategy="independent", rounds=3, beta=2.0, max_new_tokens=77))
    assert (options.strategy, options.rounds, options.beta) == ("independent", 3, 2.0)
    assert options.sampling.max_new_tokens == 77 and options.sampling.top_k == 20
