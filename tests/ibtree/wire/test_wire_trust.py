"""What comes over the wire and can not be is refused with its field, in both directions.

A tree, and every other answer. Random damage gives a FieldError or a tree that can be used.
"""

from __future__ import annotations

import math
import time
from copy import deepcopy

import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ibtree.errors import FieldError
from ibtree.tree import Finish, Tree
from ibtree.tree.options import MAX_TRAJECTORIES, TreeOptions
from ibtree.tree.score import ib_scores, trajectory_weights
from ibtree.wire import messages
from ibtree.wire.trees import tree_from_bytes, tree_from_proto, tree_to_bytes, tree_to_proto
from ibtree.wire.v1 import cache_pb2, queue_pb2, sampling_pb2, weights_pb2
from ibtree.wire.v1 import tree_pb2 as pb
from tests.ibtree.tree.growing import step_of
from tests.ibtree.wire.test_wire_broken import small

NAN, INF = math.nan, math.inf


def refused(message: pb.Tree, field: str, *words: str) -> None:
    with pytest.raises(FieldError) as caught:
        tree_from_proto(message)
    assert caught.value.field == field, str(caught.value)
    assert caught.value.problem and caught.value.allowed
    for word in words:
        assert word in str(caught.value)


def ending(ends: int) -> pb.Tree:
    """One step with which so many trajectories end."""
    tree = Tree(prompt=(9,))
    tree.insert(0, [step_of((1,))], 1.0, Finish.STOP)
    message = tree_to_proto(tree)
    message.options.init_rollouts, message.options.rounds = 4096, 4096
    message.options.branch_nodes = message.options.branch_rollouts = 4096
    message.draws[1] = message.visits[0] = message.visits[1] = ends
    message.starts[0] = message.ends[1] = ends
    message.reward_sums[0] = message.reward_sums[1] = ends
    return message


def test_billions_of_ends_in_a_hundred_bytes_are_refused():
    began = time.monotonic()
    for ends in (MAX_TRAJECTORIES + 1, 2**31, 2**32 - 1):
        refused(ending(ends), "tree.visits", f"{ends} trajectories", str(MAX_TRAJECTORIES))
    assert tree_from_proto(ending(MAX_TRAJECTORIES)).rewards().shape == (MAX_TRAJECTORIES,)
    assert time.monotonic() - began < 2.0


def test_more_trajectories_than_its_options_say_are_refused():
    message = ending(7)
    message.options.max_trajectories = 6
    refused(message, "tree.visits", "7 trajectories", "at most 6")
    message.options.max_trajectories = 7
    assert tree_from_proto(message).trajectories == 7


def test_rollouts_that_end_at_the_root_are_refused():
    message = small()
    message.ends[0], message.starts[0], message.visits[0] = 1, 2, 3
    message.finish_reasons[0] = Finish.STOP
    refused(message, "tree.ends", "the root")


def test_rollouts_of_no_steps_are_refused():
    """Started from a leaf, and ended there; every sum of counts holds."""
    message = small()
    for node in (0, 1, 2):
        message.visits[node] += 1
    message.starts[2], message.ends[2] = 1, 2
    refused(message, "tree.ends", "at node 2")


def test_siblings_that_nobody_drew_are_refused():
    tree = Tree(prompt=())
    for ids in ((1,), (2,)):
        tree.insert(0, [step_of(ids)], 1.0, Finish.STOP)
    message = tree_to_proto(tree)
    for column in (message.draws, message.visits, message.ends, message.finish_reasons):
        column[2] = 0
    message.visits[0] = message.starts[0] = 1
    message.reward_sums[0], message.reward_sums[2] = 1.0, 0.0
    refused(message, "tree.draws", "0 at node 2")


@pytest.mark.parametrize("logprob", [800.0, 0.01, NAN, INF, -INF, -1e30])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_log_probabilities_that_are_none_are_refused(logprob, at):
    message = small()
    message.logprobs[at] = logprob
    refused(message, "tree.logprobs")


@pytest.mark.parametrize("logprob", [0.0, 2e-7, -1e-30, -100.0, -2e8])
def test_log_probabilities_at_the_edges_are_taken(logprob):
    message = small()
    message.logprobs[0] = logprob
    assert tree_from_proto(message).steps[1].logprobs[0] == pytest.approx(logprob)


LEDGER = ["generated_tokens", "prefix_tokens", "cached_tokens", "refilled_tokens"]
LEDGER += ["protected_tokens", "unique_tokens"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((f"ledger.{name}", -1) for name in LEDGER),
        *(
            (f"ledger.{name}", value)
            for name in ("wall_s", "queue_s")
            for value in (-1.0, NAN, INF)
        ),
        ("ledger.seed", 2**63),
        *(("first_round_reward", value) for value in (-0.1, 1.1, NAN, INF)),
    ],
)
def test_scalars_that_can_not_be_are_refused(field, value):
    message = small()
    part = message.ledger if field.startswith("ledger") else message
    setattr(part, field.rpartition(".")[2], value)
    refused(message, f"tree.{field}")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("reward_sums", value) for value in (NAN, INF, -1.0, 3.0)),
        ("ib_scores", INF),
        ("ib_scores", -INF),
    ],
)
def test_columns_of_scalars_too(column, value):
    message = small()
    getattr(message, column)[1] = value
    refused(message, f"tree.{column}")


def test_bytes_that_are_no_tree_are_refused():
    for data in (b"\xff" * 20, tree_to_bytes(tree_from_proto(small()))[:-3]):
        with pytest.raises(FieldError) as caught:
            tree_from_bytes(data)
        assert caught.value.field.startswith("tree")


# ---- any damage at all

EDGES = [0, 1, 2, 3, 2**31 - 1, 2**31, 2**32 - 1]
NUMBERS = st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.0, 800.0, 1e-300, 1e300, NAN, INF, -INF])
NODES = ["parents", "draws", "visits", "starts", "ends", "reward_sums", "ib_scores"]
NODES += ["finish_reasons", "token_offsets", "token_ids", "logprobs", "span_lengths"]
SCALARS = ["stop_cause", "first_round_reward"]


def grown() -> pb.Tree:
    tree = Tree(prompt=(9,), options=TreeOptions(init_rollouts=8, rounds=1))
    for start, ids, reward in (
        (0, (1, 2), 1.0),
        (0, (1, 2), 1.0),
        (1, (4, 4), 0.0),
        (0, (5,), 0.5),
    ):
        tree.insert(start, [step_of(ids), step_of((3, *ids))], reward, Finish.STOP)
    return tree_to_proto(tree)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_damage_is_refused_or_harmless(data):
    message = deepcopy(grown())
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            column = getattr(message, data.draw(st.sampled_from(NODES)))
            change = data.draw(st.sampled_from(["set", "append", "delete", "near"]))
            if not column:
                continue
            at = data.draw(st.integers(0, len(column) - 1))
            if isinstance(column[0], float):
                value = data.draw(NUMBERS)
            elif change == "near":
                value = max(column[at] + data.draw(st.integers(-2, 2)), 0)
            else:
                value = data.draw(st.sampled_from(EDGES[:4] if "reason" in str(column) else EDGES))
            try:
                if change == "append":
                    column.append(value)
                elif change == "delete":
                    del column[at]
                else:
                    column[at] = value
            except (ValueError, OverflowError):
                continue  # protobuf itself takes no such number
        else:
            part = data.draw(st.sampled_from([message, message.ledger]))
            names = SCALARS if part is message else [*LEDGER, "wall_s", "queue_s", "seed"]
            name = data.draw(st.sampled_from(names))
            double = part.DESCRIPTOR.fields_by_name[name].type == FieldDescriptor.TYPE_DOUBLE
            try:
                setattr(part, name, data.draw(NUMBERS if double else st.integers(-3, 2**40)))
            except (ValueError, OverflowError):
                continue
    try:
        tree = tree_from_proto(message)
    except FieldError as error:
        assert error.field.startswith("tree") and error.problem and error.allowed
        return
    usable(tree)


def usable(tree: Tree) -> None:
    """What is done with a tree gives numbers, in memory of its own size."""
    tree.validate()
    rewards = tree.rewards()
    assert len(rewards) == tree.trajectories <= MAX_TRAJECTORIES
    assert np.isfinite(rewards).all() and (rewards >= -1e-6).all() and (rewards <= 1 + 1e-6).all()
    scores = ib_scores(tree)
    assert np.isfinite(scores[tree.inner_nodes()]).all()
    if tree.trajectories:
        assert trajectory_weights(tree, "draws").sum() == pytest.approx(1.0)
    assert tree_from_proto(tree_to_proto(tree)) == tree


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=60), st.integers(0, 10**6))
def test_any_bytes(junk, at):
    whole = grown().SerializeToString()
    at %= len(whole)
    for damaged in (junk, whole[:at] + junk + whole[at:], whole[:at] + junk + whole[at + 3 :]):
        try:
            usable(tree_from_bytes(damaged))
        except FieldError as error:
            assert error.field and error.problem and error.allowed


# ---- every other answer

EXPANSION = {
    "round": 1,
    "start_node": 0,
    "end_node": 1,
    "generated_tokens": 3,
    "reward": 0.5,
    "finish_reason": 1,
    "trajectories": 1,
    "target_trajectories": 4,
}


def event(**changes: object) -> sampling_pb2.SampleTreeResponse:
    return sampling_pb2.SampleTreeResponse(expansion=sampling_pb2.Expansion(**EXPANSION | changes))


def progress(**fields: object) -> sampling_pb2.SampleTreeResponse:
    return sampling_pb2.SampleTreeResponse(progress=sampling_pb2.Progress(**fields))


def pushed(**fields: object) -> weights_pb2.PushWeightsResponse:
    return weights_pb2.PushWeightsResponse(pushed=weights_pb2.PushedWeights(**fields))


def kept(**fields: object) -> weights_pb2.GetWeightsResponse:
    return weights_pb2.GetWeightsResponse(state=6, kept=[weights_pb2.KeptWeights(**fields)])


Served, Rolled = weights_pb2.GetWeightsResponse, weights_pb2.RollbackWeightsResponse
Audit, Cache = cache_pb2.AuditCacheResponse, cache_pb2.GetCacheResponse
Stats, Submitted = queue_pb2.GetQueueStatsResponse, sampling_pb2.SubmitPromptsResponse
BAD_ANSWERS = [
    *((messages.event_from_proto, event(reward=r), "reward") for r in (NAN, INF, -0.1, 1.1)),
    *(
        (messages.event_from_proto, event(**{name: -1}), name)
        for name in EXPANSION
        if name != "finish_reason"
    ),
    (messages.event_from_proto, event(finish_reason=7), "finish_reason"),
    (messages.event_from_proto, event(round=0), "round"),
    (messages.event_from_proto, event(trajectories=0), "trajectories"),
    (messages.event_from_proto, sampling_pb2.SampleTreeResponse(), "event"),
    *((messages.event_from_proto, progress(elapsed_s=s), "elapsed_s") for s in (NAN, INF, -1.0)),
    (messages.event_from_proto, progress(generated_tokens=-1), "generated_tokens"),
    (messages.submitted_from_proto, Submitted(accepted=-1), "accepted"),
    (messages.submitted_from_proto, Submitted(known=-1), "known"),
    *(
        (messages.stats_from_proto, Stats(**{f.name: -1}), f.name)
        for f in Stats.DESCRIPTOR.fields
        if f.name != "holds"
    ),
    (messages.cache_from_proto, Cache(evicted_tokens=-1), "evicted_tokens"),
    (messages.audit_from_proto, Audit(samples=-1), "samples"),
    (messages.audit_from_proto, Audit(max_difference=NAN), "max_difference"),
    (messages.audit_from_proto, Audit(max_difference=-1.0), "max_difference"),
    *((messages.served_from_proto, Served(state=6, age_s=s), "age_s") for s in (NAN, -1.0, INF)),
    (messages.served_from_proto, Served(state=6, pause_s=NAN), "pause_s"),
    (messages.served_from_proto, Served(state=77), "state"),
    (messages.served_from_proto, kept(file_bytes=-1), "file_bytes"),
    (messages.served_from_proto, kept(served_at_s=NAN), "served_at_s"),
    (messages.push_answer, pushed(pause_s=NAN, state=6), "pause_s"),
    (messages.push_answer, pushed(state=77), "state"),
    (messages.push_answer, weights_pb2.PushWeightsResponse(send_from=-1), "send_from"),
    (messages.rollback_from_proto, Rolled(pause_s=-1.0), "pause_s"),
]


@pytest.mark.parametrize(("decode", "answer", "field"), BAD_ANSWERS)
def test_answers_that_can_not_be_are_refused(decode, answer, field):
    with pytest.raises(FieldError) as caught:
        decode(answer)
    assert caught.value.field.rpartition(".")[2] == field


def test_answers_that_can_be_are_taken():
    assert messages.event_from_proto(event()).reward == 0.5
    assert messages.event_from_proto(progress(elapsed_s=0.0)).elapsed_s == 0.0
    assert messages.audit_from_proto(Audit(max_difference=INF)).max_difference == INF
    assert messages.served_from_proto(kept(served_at_s=1.0)).state == "serving"


def test_a_learner_gets_the_problem_with_the_lease():
    """And the other leases of the answer."""
    bad = small()
    bad.logprobs[0] = 800.0
    leases = messages.leases_from_proto(
        queue_pb2.LeaseTreesResponse(
            leases=[
                queue_pb2.TreeLease(lease_id="a", tree=small()),
                queue_pb2.TreeLease(lease_id="b", tree=bad),
                queue_pb2.TreeLease(lease_id="c", tree=small(), returns=-1),
            ]
        )
    )
    assert [lease.problem.split(":")[0] for lease in leases] == ["", "tree.logprobs", "returns"]


def test_a_server_gets_no_canary_that_is_none():
    for logprob in (NAN, 800.0):
        canary = weights_pb2.Canary(token_ids=[1, 2], logprobs=[logprob], tolerance=0.1)
        with pytest.raises(FieldError, match=r"manifest\.canary\.logprobs"):
            messages.manifest_from_proto(weights_pb2.WeightManifest(canary=canary))
