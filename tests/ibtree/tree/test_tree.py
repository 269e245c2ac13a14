"""The Tree against a reference that recomputes everything from the list of rollouts."""

from __future__ import annotations

import copy
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ibtree.tree import Finish, Step, Tree
from tests.ibtree.tree.growing import PLANS, Pair, find, step_of, trajectories

MODEST = settings(max_examples=40, deadline=None)


@MODEST
@given(PLANS, st.integers(1, 5))
def test_counts_match_the_definitions_after_each_insertion(plan, levels):
    pair = Pair(levels)
    for rollout in plan:
        pair.grow([rollout])
        pair.check_counts()
        pair.check_first_draws()
    slow = pair.slow.trajectories()
    assert trajectories(pair.fast) == {(t, round(r, 9), f): n for (t, r, f), n in slow.items()}
    rewards = sorted(r.reward for r in pair.slow.rollouts)
    assert sorted(pair.fast.rewards()) == pytest.approx(rewards, abs=1e-9)


@MODEST
@given(PLANS)
def test_find_follows_paths(plan):
    pair = Pair().grow(plan)
    tree = pair.fast
    for n in range(len(tree)):
        steps = [tree.steps[m] for m in tree.path(n)]
        assert find(tree, 0, steps) == n
        assert find(tree, n, [step_of((9,)), step_of((0,))]) is None
    assert find(tree, 0, []) == 0


def small() -> Tree:
    tree = Tree(prompt=(1,))
    tree.insert(0, [step_of((1, 2)), step_of((3,))], 1.0, Finish.STOP)
    tree.insert(1, [step_of((4, 4))], 0.0, Finish.LENGTH)
    return tree


@pytest.mark.parametrize("reward", [-0.1, 1.1, math.nan, math.inf])
def test_insert_refuses_rewards(reward):
    tree = small()
    before = copy.deepcopy(tree)
    with pytest.raises(ValueError, match="reward"):
        tree.insert(0, [step_of((1,))], reward, Finish.STOP)
    assert tree == before


def test_insert_refuses_no_steps():
    tree = small()
    before = copy.deepcopy(tree)
    with pytest.raises(ValueError, match="step"):
        tree.insert(1, [], 1.0, Finish.STOP)
    assert tree == before


@pytest.mark.parametrize("start", [-1, 4, 99])
def test_insert_refuses_a_start_that_is_not_a_node(start):
    tree = small()
    before = copy.deepcopy(tree)
    with pytest.raises(ValueError):
        tree.insert(start, [step_of((1,))], 1.0, Finish.STOP)
    assert tree == before


def test_insert_refuses_a_start_that_was_merged_away():
    """(1,)(2,) and (1,2): cutting (1,2) at 1 merges its rest into the older (2,), or it into it."""
    tree = Tree(prompt=())
    tree.insert(0, [step_of((1,)), step_of((2,)), step_of((3,))], 1.0, Finish.STOP)
    other = tree.insert(0, [step_of((1, 2)), step_of((4,))], 1.0, Finish.STOP)
    tree.split(tree.parents[other], 1)
    [gone] = [n for n in range(len(tree)) if tree.alive(n) != n]
    before = copy.deepcopy(tree)
    with pytest.raises(ValueError):
        tree.insert(gone, [step_of((9,))], 1.0, Finish.STOP)
    assert tree == before
    tree.insert(tree.alive(gone), [step_of((9,))], 1.0, Finish.STOP)
    tree.validate()


@pytest.mark.parametrize(
    ("node", "at"), [(1, 0), (1, 2), (1, -1), (2, 1), (0, 0), (0, 1), (-1, 1), (9, 1)]
)
def test_split_refuses(node, at):
    tree = small()
    before = copy.deepcopy(tree)
    with pytest.raises(ValueError):
        tree.split(node, at)
    assert tree == before


@pytest.mark.parametrize(
    ("ids", "logprobs", "versions"),
    [((), (), ()), ((1,), (), (0,)), ((1,), (-0.1,), ()), ((1, 2), (-0.1,), (0, 0))],
)
def test_step_refuses_uneven_columns(ids, logprobs, versions):
    with pytest.raises(ValueError, match="one length"):
        Step(ids, logprobs, versions)


@pytest.mark.parametrize(
    ("column", "node", "value"),
    [
        ("visits", 0, 3),
        ("visits", 1, 1),
        ("draws", 0, 1),
        ("draws", 1, 2),
        ("starts", 1, 0),
        ("ends", 2, 0),
        ("reward_sums", 2, 1.5),
        ("reward_sums", 3, -0.5),
        ("reward_sums", 2, math.nan),
    ],
)
def test_validate_sees_a_wrong_count(column, node, value):
    tree = small()
    tree.validate()
    getattr(tree, column)[node] = value
    with pytest.raises(ValueError, match=r"node \d|root"):
        tree.validate()


def test_empty_tree():
    tree = Tree(prompt=(1, 2))
    tree.validate()
    assert (len(tree), tree.trajectories, tree.unique_tokens) == (1, 0, 0)
    assert tree.rewards().shape == (0,) and tree.prefix(0) == () and tree.is_leaf(0)
