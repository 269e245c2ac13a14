"""Step advantages against the slow reference, by hand, and at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ibtree.tree import Finish, Tree
from ibtree.tree.options import CONFIDENCE_FORMS, VALUE_ESTIMATORS, TreeOptions
from learner.algo.advantage import reward_std, step_advantages
from learner.tree.training import is_uniform, tree_advantages
from tests.ibtree.tree.growing import PLANS, STARTS, Pair, alive_nodes, path_of, step_of
from tests.learner.tiny import config, flat_tree, rows_of, settings_of
from tests.reference import slow_loss

PICKS = st.lists(STARTS, max_size=3)
SPREADS = ("population", "sample")


@settings(max_examples=50, deadline=None)
@given(
    plan=PLANS,
    picks=PICKS,
    levels=st.sampled_from([1, 2, 3, 5]),
    ratio=st.sampled_from([0.0, 1.0]),
    options=st.fixed_dictionaries(
        {
            "value_estimator": st.sampled_from(VALUE_ESTIMATORS),
            "confidence": st.sampled_from(CONFIDENCE_FORMS),
            "local_scale": st.sampled_from(["token", "step"]),
            "std": st.sampled_from(SPREADS),
            "advantage_eps": st.sampled_from([0.0, 1e-4, 0.5]),
            "local_weight": st.sampled_from([0.0, 0.1, 2.0]),
            "beta": st.floats(0.5, 20),
        }
    ),
)
def test_advantages_match_the_definitions(plan, picks, levels, ratio, options):
    tree_options = TreeOptions(zero_value_ratio=ratio)
    pair = Pair(levels, distinct=not picks, options=tree_options).grow(plan).split_some(picks)
    chosen = config(**options)
    advantages, setting = tree_advantages(pair.fast, chosen), settings_of(chosen, ratio)
    assert advantages.dtype == torch.float64
    for n in alive_nodes(pair.fast):
        want = slow_loss.advantage(pair.slow, path_of(pair.fast, n), setting)
        assert math.isclose(advantages[n], want, rel_tol=1e-9, abs_tol=1e-9)


@settings(max_examples=40, deadline=None)
@given(plan=PLANS, picks=PICKS)
def test_a_row_carries_its_steps_token_for_token(plan, picks):
    pair = Pair(2, distinct=not picks).grow(plan).split_some(picks)
    chosen, seen = config(skip_uniform_trees=False), set()
    ends = {path_of(pair.fast, n) for n in pair.fast.end_nodes()}
    assert ends == {r.path for r in pair.slow.rollouts}
    rows = rows_of([pair.fast], chosen)
    for end, row in zip(pair.fast.end_nodes(), rows, strict=True):
        path = path_of(pair.fast, end)
        nodes = [path[: i + 1] for i in range(len(path))]
        steps = [pair.slow.step(node) for node in nodes]
        assert row.token_ids == tuple(t for ids in path for t in ids)
        assert row.prompt == (7, 8)
        weight = pair.slow.trajectory_weight(path, "visits")
        assert math.isclose(row.weight, weight / len(row.token_ids), rel_tol=1e-12)
        assert row.repeated == sum(len(node[-1]) for node in nodes if node in seen)
        seen.update(nodes)
        assert row.logprobs == tuple(lp for s in steps for lp in s.logprobs)
        assert row.versions == tuple(v for s in steps for v in s.versions)
        setting = settings_of(chosen)
        want = [slow_loss.advantage(pair.slow, n, setting) for n in nodes for _ in n[-1]]
        assert row.advantages == pytest.approx(want, rel=1e-9, abs=1e-9)


def test_by_hand():
    """Two branches: one of two tokens that always succeeds, one that fails half of the time."""
    tree = Tree(prompt=(7,))
    tree.insert(0, [step_of((1, 2), -0.5)], 1.0, Finish.STOP)
    tree.insert(0, [step_of((3,), -1.0), step_of((4,), -2.0)], 1.0, Finish.STOP)
    tree.insert(2, [step_of((5,), -3.0)], 0.0, Finish.STOP)
    advantages = tree_advantages(tree, config(beta=5.0, local_weight=0.1)).tolist()
    std = math.sqrt(2) / 3
    group = [0.0, (1 - 2 / 3) / std, (1 / 2 - 2 / 3) / std, (1 - 2 / 3) / std, (0 - 2 / 3) / std]
    gain = [0.0, 1.5 - 1.2, 0.75 - 1.2, 2.0 - 1.2, 0.0 - 1.2]
    sure = [1.0, math.exp(-0.5), math.exp(-1), math.exp(-2), math.exp(-3)]
    want = [g + 0.1 * i * c for g, i, c in zip(group, gain, sure, strict=True)]
    assert advantages == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("std", SPREADS)
def test_equal_rewards_leave_only_the_local_term(std):
    tree = flat_tree([((1,), 1.0), ((2,), 1.0), ((2,), 1.0)])
    chosen = config(std=std, skip_uniform_trees=False)
    want = 0.1 * (1.0 - 1.2) * math.exp(-0.5)
    assert tree_advantages(tree, chosen).tolist() == pytest.approx([0.0, want, want])
    assert tree_advantages(tree, config(std=std, local_weight=0.0)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("std", SPREADS)
def test_one_trajectory_has_no_spread(std):
    assert reward_std(torch.tensor([1.0]), std) == 0.0
    advantages = tree_advantages(flat_tree([((1, 2), 1.0)]), config(std=std, local_weight=0.0))
    assert advantages.tolist() == [0.0, 0.0]


def test_local_scale_step_divides_the_local_term_by_the_steps_tokens():
    tree = flat_tree([((1, 2, 3, 4), 1.0), ((5,), 0.0)])
    token = tree_advantages(tree, config(local_weight=1.0))
    step = tree_advantages(tree, config(local_weight=1.0, local_scale="step"))
    group = tree_advantages(tree, config(local_weight=0.0))
    assert torch.allclose((step - group)[1:], (token - group)[1:] / torch.tensor([4.0, 1.0]))


def test_twins_count_in_the_spread_and_in_the_weight_but_not_in_the_advantage():
    """Three rollouts, two of them alike: (R - mean) / std over all three."""
    tree = flat_tree([((1,), 1.0), ((1,), 1.0), ((2,), 0.0)])
    first, second = rows_of([tree], config(local_weight=0.0))
    std = math.sqrt(2) / 3
    assert (first.advantages[0], second.advantages[0]) == pytest.approx(
        ((1 - 2 / 3) / std, (0 - 2 / 3) / std)
    )
    assert (first.weight, second.weight) == pytest.approx((2 / 3, 1 / 3))


def test_the_root_has_no_advantage_and_the_arguments_are_left_alone():
    arguments = [torch.tensor([0.5, 1.0], dtype=torch.float64) for _ in range(3)]
    advantages = step_advantages(*arguments, torch.tensor([1.0, 0.0]), local_weight=0.1)
    assert advantages.tolist() == pytest.approx([0.0, 1.1])
    assert all(x.tolist() == [0.5, 1.0] for x in arguments)


def _all_alike(reward: float) -> Tree:
    """Twelve rollouts of one reward; sums of it round (0.1 + 0.1 + 0.1 > 0.3)."""
    tree = Tree(prompt=(7,))
    for i in range(12):
        tree.insert(0, [step_of((2,)), step_of((i % 5,))], reward, Finish.STOP)
    return tree


@pytest.mark.parametrize("reward", [0.1, 0.7])
def test_equal_partial_rewards_are_uniform(reward):
    assert is_uniform(_all_alike(reward))


@pytest.mark.parametrize("reward", [0.1, 0.7])
def test_equal_partial_rewards_have_no_group_advantage(reward):
    chosen = config(local_weight=0.0, skip_uniform_trees=False)
    assert tree_advantages(_all_alike(reward), chosen).abs().max() < 1e-9
