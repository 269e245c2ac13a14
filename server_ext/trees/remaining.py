"""How much of a growing tree is still to come."""

from __future__ import annotations

from ibtree.tree import Tree
from server_ext.trees.strategies import strategy_named


def left_s(tree: Tree, elapsed_s: float) -> float | None:
    """Seconds to the tree's end if it goes on as in the `elapsed_s` since it began; None while no
    rollout has ended. Counted is what comes one after another: rounds under the schedule `rounds`,
    under `eager` as many rollouts as are in flight at once."""
    options, done = tree.options, tree.trajectories
    if not done:
        return None
    first = min(strategy_named(options.strategy).first(options), options.trajectories)
    eager = options.schedule == "eager"
    a_round = first if eager else options.branch_nodes * options.branch_rollouts

    def rounds(trajectories: int) -> float:
        return min(trajectories, first) / first + max(trajectories - first, 0) / a_round

    left = elapsed_s * (rounds(options.trajectories) / rounds(done) - 1)
    if options.deadline_s is not None:
        left = min(left, options.deadline_s - elapsed_s)
    return max(left, 0.0)
