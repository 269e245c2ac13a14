"""Trees and options through bytes: nothing is lost, nothing broken gets in, little is wasted."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ibtree.errors import FieldError
from ibtree.tree import Finish, Ledger, Step, StopCause, Tree
from ibtree.tree.options import SamplingOptions, TreeOptions, changed
from ibtree.tree.score import best, candidates, ib_scores
from ibtree.wire.trees import options_from_proto, options_to_proto, tree_from_proto, tree_to_proto
from ibtree.wire.v1 import tree_pb2 as pb
from tests.ibtree.tree.growing import PLANS, STARTS, Pair, alive_nodes, path_of

COLUMNS = ("draws", "visits", "starts", "ends", "reward_sums", "finishes", "steps")


def through_bytes(tree: Tree) -> Tree:
    return tree_from_proto(pb.Tree.FromString(tree_to_proto(tree).SerializeToString()))


def by_path(tree: Tree) -> dict:
    """Columns and score of each path; sums over children may differ in the last digit."""
    scores = np.nan_to_num(ib_scores(tree), nan=-1e9).round(9)
    return {
        path_of(tree, n): (scores[n], *(getattr(tree, c)[n] for c in COLUMNS))
        for n in alive_nodes(tree)
    }


@settings(max_examples=50, deadline=None)
@given(
    plan=PLANS,
    picks=st.lists(STARTS, max_size=4),
    form=st.sampled_from(("geometric", "product", "sibling")),
    beta=st.floats(0.1, 50),
    limit=st.none() | st.integers(1, 10**6),
)
def test_round_trip(plan, picks, form, beta, limit):
    options = TreeOptions(
        confidence=form, beta=beta, max_generated_tokens=limit, sampling=SamplingOptions(top_k=-1)
    )
    tree = Pair(options=options).grow(plan).split_some(picks).fast
    tree.tree_id, tree.model_id, tree.answer = "t1", "m" * 64, "42 ä"
    tree.ledger = Ledger(100, 200, 150, 1.5, 0.25)
    tree.stop_cause = StopCause.DEADLINE
    message = tree_to_proto(tree)
    back = through_bytes(tree)
    if not picks:
        assert back == tree, "every column in the same order"
    assert by_path(back) == by_path(tree)
    for name in ("prompt", "tree_id", "model_id", "answer", "options", "ledger", "stop_cause"):
        assert getattr(back, name) == getattr(tree, name)
    assert through_bytes(back) == back
    assert all(p < i for i, p in enumerate(back.parents[1:], 1)) and all(back.visits)
    assert message.ledger.unique_tokens == tree.unique_tokens == len(message.token_ids)
    assert np.allclose(message.ib_scores, ib_scores(back), rtol=1e-6, atol=1e-6, equal_nan=True)


def test_empty_tree_round_trip():
    tree = Tree(prompt=(1, 2**32 - 1))
    assert through_bytes(tree) == tree


def grown(steps: int, length: int, vocabulary: int) -> Tree:
    """A (4, 9, 1, 1) tree; trajectories of `steps` steps of about `length` tokens."""
    rng = random.Random(0)
    f32 = np.random.default_rng(0).normal(-0.5, 0.3, 10**6).astype(np.float32).tolist()
    tree = Tree(
        prompt=tuple(rng.randrange(vocabulary) for _ in range(24)),
        tree_id="arith-000123",
        model_id="ab" * 32,
        answer="-17",
    )

    def rollout(start: int) -> None:
        made = []
        for _ in range(max(steps - tree.depth_steps(start), 1)):
            n = max(1, length + rng.randint(-length // 3, length // 3))
            ids = tuple(rng.randrange(vocabulary) for _ in range(n))
            made.append(Step(ids, tuple(-abs(f32.pop()) for _ in ids), (rng.randrange(2),) * n))
        tree.insert(start, made, float(rng.random() < 0.4), Finish.STOP)

    for _ in range(4):
        rollout(0)
    for _ in range(8):
        rollout(best(tree, ib_scores(tree), candidates(tree), 1)[0])
    return tree


@pytest.mark.parametrize(
    ("length", "vocabulary"), [(6, 60), (60, 151_000)], ids=["arith", "large model"]
)
def test_bytes_per_unique_token(length, vocabulary, record_property):
    tree = grown(6, length, vocabulary)
    assert tree.trajectories == 12
    per_token = len(tree_to_proto(tree).SerializeToString()) / tree.unique_tokens
    record_property("bytes_per_unique_token", per_token)
    print(
        f"{per_token:.2f} bytes per unique token ({tree.unique_tokens} tokens, {len(tree)} nodes)"
    )
    assert per_token <= 14
    assert through_bytes(tree) == tree


def test_absent_options_take_the_defaults():
    defaults = changed(TreeOptions(), beta=2.0, rounds=3, top_k=-1, deadline_s=4.0)
    assert options_from_proto(pb.TreeOptions(), defaults) == defaults
    partial = pb.TreeOptions(rounds=1, sampling=pb.SamplingOptions(temperature=1.5))
    expected = changed(defaults, rounds=1, temperature=1.5)
    assert options_from_proto(partial, defaults) == expected
    full = changed(
        expected,
        strategy="independent",
        max_generated_tokens=7,
        max_trajectories=5,
        stop=("END", "é\n"),
        stop_token_ids=(0, 7),
    )
    assert options_from_proto(options_to_proto(full), TreeOptions()) == full
    message = tree_to_proto(Tree(prompt=(), options=full))
    message.ClearField("options")
    assert tree_from_proto(message).options == TreeOptions()


def test_a_mapping_sends_its_options_alone():
    message = options_to_proto({"rounds": 3, "top_k": -1, "stop_token_ids": [5], "beta": 5.0})
    assert {f.name for f, _ in message.ListFields()} == {"rounds", "beta", "sampling"}
    assert {f.name for f, _ in message.sampling.ListFields()} == {"top_k", "stop_token_ids"}
    defaults = TreeOptions(rounds=7, init_rollouts=2, beta=1.0)
    options = options_from_proto(message, defaults)
    assert options == changed(defaults, rounds=3, beta=5.0, top_k=-1, stop_token_ids=(5,))
    assert options_to_proto({}) == pb.TreeOptions(sampling=pb.SamplingOptions())


@pytest.mark.parametrize(
    ("mapping", "field"),
    [({"round": 3}, "round"), ({"top_p": 2.0}, "sampling.top_p"), ({"sampling": 1}, "sampling")],
)
def test_a_mapping_of_bad_options_is_refused(mapping, field):
    with pytest.raises(FieldError) as caught:
        options_to_proto(mapping)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("sampling.temperature", math.nan, "(0.0, 100.0]"),
        ("sampling.temperature", 0.0, "(0.0, 100.0]"),
        ("sampling.temperature", math.inf, "(0.0, 100.0]"),
        ("sampling.temperature", 9e-7, "at least 1e-06"),
        ("sampling.temperature", 5e-324, "at least 1e-06"),
        ("sampling.top_p", 0.0, "(0.0, 1.0]"),
        ("sampling.top_p", 1.1, "(0.0, 1.0]"),
        ("sampling.top_k", 0, "[1, "),
        ("sampling.top_k", -2, "[1, "),
        ("sampling.max_new_tokens", 0, "[1, "),
        ("init_rollouts", -1, "[1, 4096]"),
        ("init_rollouts", 2**31 - 1, "[1, 4096]"),
        ("rounds", 0, "[1, 4096]"),
        ("branch_nodes", -(2**31), "[1, 4096]"),
        ("branch_rollouts", 5000, "[1, 4096]"),
        ("beta", 0.0, "(0.0, "),
        ("beta", math.nan, "(0.0, "),
        ("zero_value_ratio", -0.5, "[0.0, "),
        ("zero_value_ratio", math.nan, "[0.0, "),
        ("value_estimator", "median", "mean | backup"),
        ("confidence", "", "geometric | product | sibling"),
        ("deadline_s", 0.0, "(0.0, "),
        ("deadline_s", math.nan, "(0.0, "),
        ("max_generated_tokens", 0, "[1, "),
        ("max_trajectories", 0, "[1, "),
        ("max_trajectories", -1, "[1, "),
    ],
)
def test_options_out_of_range_name_field_and_range(field, value, allowed):
    *outer, name = field.split(".")
    message = pb.TreeOptions()
    setattr(message.sampling if outer else message, name, value)
    with pytest.raises(FieldError) as caught:
        options_from_proto(message, TreeOptions())
    assert caught.value.field == field
    assert field in str(caught.value) and allowed in str(caught.value)
    tree = tree_to_proto(Tree(prompt=()))
    tree.options.CopyFrom(message)
    with pytest.raises(FieldError, match=name):
        tree_from_proto(tree)


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (pb.SamplingOptions(stop=[""]), "sampling.stop: characters"),
        (pb.SamplingOptions(stop=["x" * 257]), "sampling.stop: characters"),
        (pb.SamplingOptions(stop=["x"] * 17), "sampling.stop: texts"),
        (pb.SamplingOptions(stop_token_ids=[1] * 65), "sampling.stop_token_ids"),
    ],
)
def test_stops_out_of_range(sampling, words):
    with pytest.raises(FieldError, match=words):
        options_from_proto(pb.TreeOptions(sampling=sampling), TreeOptions())


def test_step_texts_travel_when_asked_for():
    tree = Pair().grow([(0, [(1, 2), (0,)]), (0, [(1, 1)])]).fast
    assert not tree_to_proto(tree).texts
    message = tree_to_proto(tree, text=lambda ids: f"{len(ids)} tokens")
    texts = tree_from_proto(message).texts
    assert texts == [f"{len(step.token_ids)} tokens" for step in tree.steps]
    del message.texts[-1]
    with pytest.raises(FieldError, match=r"tree\.texts"):
        tree_from_proto(message)


def test_serialising_leaves_the_tree_alone():
    tree = Pair().grow([(0, [(1, 2), (0,)]), (0, [(1, 1)])]).split_some([0]).fast
    before = copy.deepcopy(tree)
    tree_to_proto(tree)
    assert tree == before and replace(tree) == tree
