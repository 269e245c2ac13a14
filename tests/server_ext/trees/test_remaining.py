"""How much of a tree is still to come."""

from __future__ import annotations

import pytest

from ibtree.tree import Finish, Step, Tree
from ibtree.tree.options import TreeOptions
from server_ext.trees.remaining import left_s


def grown(done: int, **options) -> Tree:
    tree = Tree(prompt=(1,), options=TreeOptions(**options))
    for number in range(done):
        tree.insert(0, [Step((number + 2,), (-1.0,), (0,))], 1.0, Finish.STOP)
    return tree


@pytest.mark.parametrize(
    ("done", "options", "left"),
    [
        (0, {}, None),
        (12, {}, 0.0),  # 4 + 8 one after another: nine rounds
        (4, {}, 80.0),  # one round took 10 s
        (8, {}, 8.0),  # five took 10 s, four are left
        (2, {}, 170.0),  # half a round
        (4, {"strategy": "independent"}, 20.0),  # all twelve at once
        (4, {"schedule": "eager"}, 20.0),  # four at a time
        (8, {"branch_nodes": 2, "branch_rollouts": 2, "rounds": 3}, 5.0),
        (4, {"deadline_s": 30.0}, 20.0),
        (4, {"deadline_s": 5.0}, 0.0),
        (4, {"max_trajectories": 6}, 20.0),
    ],
)
def test_left(done, options, left):
    assert left_s(grown(done, **options), 10.0) == (left if left is None else pytest.approx(left))
