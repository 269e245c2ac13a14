"""Splits: the same rollouts, told with finer steps."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ibtree.tree import Finish, Tree
from tests.ibtree.tree.growing import PLANS, STARTS, STEPS, Pair, alive_nodes, step_of, trajectories

MODEST = settings(max_examples=40, deadline=None)
PICKS = st.lists(STARTS, min_size=1, max_size=8)


@MODEST
@given(PLANS, PICKS, PLANS)
def test_split_keeps_what_happened(plan, picks, later):
    pair = Pair(distinct=False).grow(plan)
    for pick in picks:
        before = trajectories(pair.fast)
        pair.split_some([pick])
        pair.check_counts()
        pair.check_first_draws()
        assert trajectories(pair.fast) == before
    pair.grow(later).check_counts()


@MODEST
@given(PLANS, PICKS)
def test_split_keeps_the_first_draw(plan, picks):
    pair = Pair(distinct=True).grow(plan)
    for pick in picks:
        pair.split_some([pick]).check_first_draws()


def test_split_keeps_the_first_draw_where_an_older_upper_part_is_folded():
    """[1,2,3] is drawn first; its upper part [1,2] is still older than [1,4]."""
    tree = Tree(prompt=())
    first = tree.insert(0, [step_of((1, 2, 3), -0.1, version=1)], 1.0, Finish.STOP)
    second = tree.insert(0, [step_of((1, 4), -0.9, version=2)], 0.0, Finish.STOP)
    tree.split(first, 2)
    upper = tree.split(second, 1)
    assert tree.steps[upper] == step_of((1,), -0.1, version=1)


def test_split_keeps_the_first_draw_where_an_older_upper_part_is_merged():
    """(2,) below (1,) is cut out of the first rollout, the second one's (1,2) folds into it."""
    tree = Tree(prompt=())
    end = tree.insert(0, [step_of((1,)), step_of((2, 3), -0.1, version=1)], 1.0, Finish.STOP)
    other = tree.insert(0, [step_of((1, 2), -0.9, version=2), step_of((5,))], 0.0, Finish.STOP)
    upper = tree.split(end, 1)
    tree.split(tree.parents[other], 1)
    assert tree.prefix(upper) == (1, 2) and tree.draws[upper] == 2
    assert tree.steps[upper] == step_of((2,), -0.1, version=1)


@MODEST
@given(PLANS)
def test_split_everywhere_gives_the_prefix_trie(plan):
    pair = Pair(distinct=False).grow(plan)
    while splits := pair.splittable():
        pair.split(*splits[0])
    pair.check_counts()
    assert pair.fast.unique_tokens == len(pair.slow.token_prefixes())
    assert len(alive_nodes(pair.fast)) == 1 + pair.fast.unique_tokens


@MODEST
@given(PLANS)
def test_split_at_shared_prefixes_is_enough_for_unique_tokens(plan):
    pair = Pair(distinct=False).grow(plan)
    tree = pair.fast

    def clash() -> tuple[int, int] | None:
        for n in alive_nodes(tree):
            for a in tree.children(n):
                for b in tree.children(n):
                    ids, other = tree.steps[a].token_ids, tree.steps[b].token_ids
                    if a != b and ids[0] == other[0] and len(ids) > 1:
                        return a, 1
        return None

    while split := clash():
        pair.split(*split)
    pair.check_counts()
    assert tree.unique_tokens == len(pair.slow.token_prefixes())


@MODEST
@given(PLANS, PICKS, STARTS, STEPS)
def test_rollouts_in_flight_survive_splits(plan, picks, pick, steps):
    pair = Pair(distinct=False).grow(plan)
    tree = pair.fast
    prefixes = {n: tree.prefix(n) for n in range(len(tree))}
    inner = pair.inner()
    start = inner[pick % len(inner)]
    for cut in picks:
        pair.split_some([cut])
        for n, prefix in prefixes.items():
            assert tree.prefix(tree.alive(n)) == prefix
    end = pair.insert(tree.alive(start), steps)
    assert tree.prefix(end) == prefixes[start] + tuple(t for ids in steps for t in ids)
    pair.check_counts()


def test_split_by_hand():
    """Draws: (1,2,3) twice, (1,2,4) once, (1,) once; one rollout starts below (1,2,3)."""
    tree = Tree(prompt=())
    a = tree.insert(0, [step_of((1, 2, 3)), step_of((5,))], 1.0, Finish.STOP)
    tree.insert(0, [step_of((1, 2, 3)), step_of((6,))], 0.0, Finish.STOP)
    b = tree.insert(0, [step_of((1, 2, 4))], 1.0, Finish.LENGTH)
    c = tree.insert(0, [step_of((1,))], 0.5, Finish.STOP)
    a = tree.parents[a]
    tree.insert(a, [step_of((5,))], 1.0, Finish.STOP)
    upper = tree.split(a, 2)
    assert tree.steps[upper].token_ids == (1, 2)
    assert tree.children(upper) == [a, b] and set(tree.children(0)) == {c, upper}
    assert (tree.draws[upper], tree.visits[upper]) == (3, 4)
    assert (tree.starts[upper], tree.ends[upper], tree.reward_sums[upper]) == (0, 0, 3.0)
    assert (tree.draws[a], tree.visits[a], tree.starts[a]) == (2, 3, 1)
    assert tree.split(upper, 1) == c, "the step (1,) itself is the shared upper part"
    assert (tree.draws[c], tree.visits[c], tree.ends[c], tree.reward_sums[c]) == (4, 5, 1, 3.5)
    assert tree.prefix(a) == (1, 2, 3) and tree.reward(c) == pytest.approx(0.5)
    tree.validate()


@pytest.mark.parametrize("older", [0, 1])
@pytest.mark.parametrize("ending", [0, 1, 2])
def test_split_merges_equal_nodes(older, ending):
    """(1,)(2,) and (1,2) become one node, whichever is older and at whichever rollouts end (2:
    both); rollouts start from both, and below both there is a (3,)."""
    pair = Pair(distinct=False)
    ways = [[(1,), (2,)], [(1, 2)]]
    for way in (ways[older], ways[1 - older]):
        end = pair.insert(0, [*way, (3,), (4,)])
        pair.insert(pair.fast.path(end)[-3], [(3,), (5,)])
        if ending in (2, ways.index(way)):
            pair.insert(0, way)
    tree = pair.fast
    folded = next(n for n in range(len(tree)) if tree.steps[n].token_ids == (1, 2))
    pair.split(folded, 1)
    pair.check_counts()
    [merged] = tree.children(tree.children(0)[0])
    assert (tree.starts[merged], tree.draws[merged]) == (2, 3 if ending < 2 else 4)
    assert len(tree.children(merged)) == 1 and tree.alive(folded) == merged
    pair.insert(tree.alive(folded), [(6,)])
    pair.check_counts()
