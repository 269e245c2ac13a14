"""Trees from the wire whose columns do not make a tree: each is refused with the field's name."""

from __future__ import annotations

import math

import pytest

from ibtree.errors import FieldError
from ibtree.tree import Finish, Tree
from ibtree.wire.messages import leases_from_proto
from ibtree.wire.trees import tree_from_proto, tree_to_proto
from ibtree.wire.v1 import queue_pb2
from ibtree.wire.v1 import tree_pb2 as pb
from tests.ibtree.tree.growing import step_of


def small() -> pb.Tree:
    """Nodes: 1 = (1, 2), 2 = (3,) below it, 3 = (4, 4) below it, drawn by a branch at 1."""
    tree = Tree(prompt=(9,))
    tree.insert(0, [step_of((1, 2)), step_of((3,))], 1.0, Finish.STOP)
    tree.insert(1, [step_of((4, 4), version=3)], 0.0, Finish.LENGTH)
    return tree_to_proto(tree)


NODE_COLUMNS = ["draws", "visits", "starts", "ends", "reward_sums", "ib_scores", "finish_reasons"]
TOKEN_COLUMNS = ["token_offsets", "token_ids", "logprobs", "span_lengths", "span_versions"]


@pytest.mark.parametrize("column", [*NODE_COLUMNS, *TOKEN_COLUMNS, "parents"])
@pytest.mark.parametrize("how", ["longer", "shorter", "empty"])
def test_a_column_of_the_wrong_length_is_refused(column, how):
    message = small()
    values = getattr(message, column)
    if how == "longer":
        values.append(values[-1])
    else:
        del values[-1 if how == "shorter" else 0 :]
    with pytest.raises(FieldError, match=r"tree\.\w+") as caught:
        tree_from_proto(message)
    if column in NODE_COLUMNS:
        assert caught.value.field == f"tree.{column}"
    elif column in ("parents", "token_ids"):  # what the others are measured by: those are named
        assert "one a node" in str(caught.value) or "tree.token_offsets" in str(caught.value)
    else:
        assert column in str(caught.value)


@pytest.mark.parametrize(
    ("column", "index", "value", "named"),
    [
        ("parents", 0, 1, "tree.parents"),
        ("parents", 1, 1, "tree.parents"),
        ("parents", 1, 3, "tree.parents"),
        ("parents", 3, 2**32 - 1, "tree.parents"),
        ("token_offsets", 0, 1, "tree.token_offsets"),
        ("token_offsets", 1, 1, "tree.token_offsets"),  # the root has no tokens
        ("token_offsets", 2, 3, "tree.token_offsets"),  # a step without tokens
        ("token_offsets", 2, 4, "tree.token_offsets"),  # descends
        ("token_offsets", 4, 4, "tree.token_offsets"),
        ("logprobs", 2, math.nan, "tree.logprobs"),
        ("logprobs", 0, -math.inf, "tree.logprobs"),
        ("span_lengths", 0, 4, "span_lengths"),
        ("span_versions", 0, 2**63, "span_versions"),
        ("visits", 0, 3, "visits"),
        ("visits", 1, 3, "visits"),
        ("draws", 0, 1, "draws"),
        ("draws", 2, 2, "draws"),
        ("starts", 1, 0, "draws"),
        ("ends", 3, 0, "ends"),
        ("reward_sums", 2, 1.5, "reward"),
        ("reward_sums", 1, -0.5, "reward"),
        ("reward_sums", 1, math.nan, "reward"),
        ("reward_sums", 3, 1.0, "reward"),  # more than its parent's
        ("finish_reasons", 2, 9, "finish_reasons"),
        ("finish_reasons", 2, 0, "finish_reasons"),  # a rollout ends there
        ("finish_reasons", 1, 1, "finish_reasons"),  # none does
    ],
)
def test_a_broken_column_is_refused(column, index, value, named):
    message = small()
    assert isinstance(tree_from_proto(message), Tree)
    getattr(message, column)[index] = value
    with pytest.raises(FieldError, match=r"tree") as caught:
        tree_from_proto(message)
    assert named in str(caught.value)


def test_a_repeated_sibling_is_refused():
    tree = Tree(prompt=())
    for ids in ((1,), (2,)):
        tree.insert(0, [step_of(ids)], 1.0, Finish.STOP)
    message = tree_to_proto(tree)
    message.token_ids[1] = 1
    with pytest.raises(FieldError, match="sibling") as caught:
        tree_from_proto(message)
    assert caught.value.field == "tree.token_ids"


def test_a_node_that_nobody_drew_is_refused():
    """A rollout started from a node that was never sampled; the two sums of counts still hold."""
    tree = Tree(prompt=())
    tree.insert(0, [step_of((1,)), step_of((2,))], 1.0, Finish.STOP)
    message = tree_to_proto(tree)
    message.starts[0], message.draws[1], message.starts[1] = 0, 0, 1
    with pytest.raises(FieldError, match="draws"):
        tree_from_proto(message)


def test_an_unknown_stop_cause_is_refused():
    message = small()
    message.stop_cause = 77
    with pytest.raises(FieldError, match="stop_cause"):
        tree_from_proto(message)


def test_no_nodes_are_refused():
    with pytest.raises(FieldError, match="parents"):
        tree_from_proto(pb.Tree())


def test_a_broken_tree_does_not_take_the_others_of_its_response_down():
    broken = small()
    broken.tree_id, broken.parents[1] = "odd", 3
    response = queue_pb2.LeaseTreesResponse(
        leases=[
            queue_pb2.TreeLease(lease_id=str(i), tree=tree, returns=i)
            for i, tree in enumerate([small(), broken, pb.Tree(), small()])
        ]
    )
    leases = leases_from_proto(response)
    assert [(lease.lease_id, lease.returns) for lease in leases] == [(str(i), i) for i in range(4)]
    assert [bool(lease.problem) for lease in leases] == [False, True, True, False]
    assert "tree.parents" in leases[1].problem and leases[1].tree.tree_id == "odd"
    assert leases[0].tree == leases[3].tree == tree_from_proto(small())
    assert leases[1].tree.trajectories == 0
