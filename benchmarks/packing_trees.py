"""Synthetic trees for bench_packing.py."""

from __future__ import annotations

import math
import random

from ibtree.tree import Finish, Step, Tree
from ibtree.tree.options import TreeOptions


def synthetic_tree(
    rng: random.Random, *, prompt: int, tokens: int, vocabulary: int, step: int = 32
) -> Tree:
    """A (4, 9, 1, 1) tree: trajectories of `tokens` tokens in steps of `step`, branches from steps
    drawn uniformly, about half of them right; log-probabilities near those of an even guess."""
    tree = Tree(tuple(rng.randrange(vocabulary) for _ in range(prompt)), options=TreeOptions())
    for i in range(tree.options.trajectories):
        inner = [n for n in range(1, len(tree)) if not tree.is_leaf(n)]
        start = 0 if i < tree.options.init_rollouts else rng.choice(inner)
        steps = [
            _step(rng, min(step, tokens - at), vocabulary)
            for at in range(tree.depth_tokens(start), tokens, step)
        ]
        tree.insert(start, steps, float(i % 2), Finish.STOP)
    return tree


def _step(rng: random.Random, tokens: int, vocabulary: int) -> Step:
    ids = tuple(rng.randrange(vocabulary) for _ in range(tokens))
    logprobs = tuple(rng.uniform(-0.1, 0.1) - math.log(vocabulary) for _ in ids)
    return Step(ids, logprobs, (0,) * tokens)


def single_trajectories(tree: Tree) -> list[Tree]:
    """A tree of its own for each distinct trajectory, the prompt repeated."""
    trajectories = []
    for end in tree.end_nodes():
        trajectory = Tree(tree.prompt, options=tree.options)
        trajectory.insert(0, [tree.steps[n] for n in tree.path(end)], tree.reward(end), Finish.STOP)
        trajectories.append(trajectory)
    return trajectories


def flat_tokens(tree: Tree) -> int:
    """Tokens over all trajectories, prompt repeated."""
    return sum(len(tree.prompt) + tree.depth_tokens(end) for end in tree.end_nodes())


def packed_tokens(tree: Tree) -> int:
    """Unique tokens, prompt once."""
    return len(tree.prompt) + tree.unique_tokens
