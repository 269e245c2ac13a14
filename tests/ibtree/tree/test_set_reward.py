"""Other rewards for rollouts that are in the tree already."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ibtree.tree import Finish, Tree
from tests.ibtree.tree.growing import PLANS, STARTS, Pair, path_of, step_of

CHANGES = st.lists(st.tuples(STARTS, st.sampled_from([0.0, 0.1, 0.5, 1.0])), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(PLANS, st.lists(STARTS, max_size=3), CHANGES)
def test_every_count_is_as_if_they_had_been_inserted_with_it(plan, picks, changes):
    pair = Pair().grow(plan).split_some(picks)
    for pick, reward in changes:
        ends = pair.fast.end_nodes()
        node = ends[pick % len(ends)]
        for rollout in pair.slow.rollouts:
            if rollout.path == path_of(pair.fast, node):
                rollout.reward = reward
        pair.fast.set_reward(node, reward)
        pair.check_counts()


@pytest.mark.parametrize(
    ("node", "reward"), [(1, 0.5), (9, 0.5), (-1, 0.5), (2, 1.01), (2, -0.01), (2, float("nan"))]
)
def test_what_cannot_be_is_refused(node, reward):
    tree = Tree(prompt=())
    tree.insert(0, [step_of((1,)), step_of((2,))], 1.0, Finish.STOP)
    before = copy.deepcopy(tree)
    with pytest.raises(ValueError):
        tree.set_reward(node, reward)
    assert tree == before
