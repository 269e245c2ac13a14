"""The packed form of a tree, its cuts and its packs, against what each trajectory says."""

from __future__ import annotations

import random
from dataclasses import fields

import numpy as np
import pytest
import torch

from ibtree.tree import Tree
from learner.tree.layout import first_fit
from learner.tree.pack import Pack, Piece, depth_first, drafts, pack, packs, padded
from learner.tree.training import training_trees
from tests.learner.tiny import config, flat_tree, rows_of, wild_tree

SHAPES = [(1, 1, 0), (2, 3, 1), (6, 8, 3), (12, 20, 6), (45, 12, 25), (3, 60, 5)]
LIMITS = [1, 30, 100, 100_000]


def tree_of(shape: tuple[int, int, int], seed: int = 0) -> Tree:
    rollouts, depth, splits = shape
    return wild_tree(
        random.Random(f"{shape}/{seed}"), rollouts=rollouts, depth=depth, splits=splits
    )


def pieces_of(trees: list[Tree], **changes) -> list[Piece]:
    chosen = config(skip_uniform_trees=False, **changes)
    return [
        Piece(draft, training_tree)
        for training_tree in training_trees(trees, chosen)
        for draft in drafts(training_tree.tree, training_tree.weight_N, chosen)
    ]


def path_of(packed: Pack, token: int) -> list[int]:
    """The tokens from the prompt's first to this one, by predecessors."""
    up = [token]
    while packed.predecessor[up[-1]] >= 0:
        up.append(int(packed.predecessor[up[-1]]))
    return up[::-1]


def contexts(packed: Pack) -> list[tuple[int, ...]]:
    return [tuple(packed.ids[path_of(packed, int(t))].tolist()) for t in packed.target]


def nodes(tree: Tree) -> int:
    return sum(tree.alive(n) == n for n in range(1, len(tree)))


def test_the_trees_here_are_of_every_kind():
    trees = [tree_of(shape, seed) for shape in SHAPES for seed in range(2)]
    assert min(map(nodes, trees)) == 1 and 150 < max(map(nodes, trees)) <= 200
    assert max(max(map(tree.depth_steps, tree.end_nodes())) for tree in trees) >= 60
    assert any(not tree.is_leaf(n) for tree in trees for n in tree.end_nodes())
    assert any(tree.alive(n) != n for tree in trees for n in range(len(tree)))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("length_norm", ["trajectory", "token", "constant"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_token_stands_once_with_the_sum_of_its_trajectories_weights(
    shape, length_norm, limit
):
    """Sums over rows and over packs, by prompt and tokens up to each (siblings may begin alike)."""
    trees = [tree_of(shape, seed) for seed in range(2)]
    trees[1].prompt = (5, *trees[1].prompt)
    changes = {"length_norm": length_norm, "trajectory_weight": "draws"}
    sums_of_rows: dict[tuple[int, ...], torch.Tensor] = {}
    for row in rows_of(trees, config(skip_uniform_trees=False, **changes)):
        for t in range(len(row.token_ids)):
            columns = [1.0, row.logprobs[t], row.versions[t], row.advantages[t]]
            values = [float(t >= row.repeated), *(row.weight * column for column in columns)]
            add(sums_of_rows, row.prompt + row.token_ids[: t + 1], values)
    sums_of_packs: dict[tuple[int, ...], torch.Tensor] = {}
    for part in packs(pieces_of(trees, micro_batch_tokens=limit, **changes), limit):
        columns = [torch.ones_like(part.weight), part.old_logp, part.versions, part.advantage]
        sums = [torch.ones_like(part.weight), *(part.weight * column for column in columns)]
        for key, values in zip(contexts(part), torch.stack(sums, 1).tolist(), strict=True):
            add(sums_of_packs, key, values)
    assert sums_of_packs.keys() == sums_of_rows.keys()
    for key, values in sums_of_rows.items():
        assert sums_of_packs[key].tolist() == pytest.approx(values.tolist(), rel=1e-9, abs=1e-12)


def add(sums: dict[tuple[int, ...], torch.Tensor], key: tuple[int, ...], values: list) -> None:
    sums[key] = sums.get(key, 0.0) + torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_positions_are_depths_and_intervals_are_ancestors(shape):
    packed = pack(pieces_of([tree_of(shape, seed) for seed in range(3)], micro_batch_tokens=70))
    for q in range(0, len(packed.ids), 3):
        path = path_of(packed, q)
        assert int(packed.position[q]) == len(path) - 1
        assert [k for k in range(len(packed.ids)) if k <= q <= packed.last[k]] == path


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_part_is_within_the_limit_or_a_single_trajectory(shape, limit):
    tree = tree_of(shape)
    parts = [piece.draft for piece in pieces_of([tree], micro_batch_tokens=limit)]
    for part in parts:
        assert len(part.ids) <= limit or bool((np.diff(part.layout.position) == 1).all())
    if len(tree.prompt) + tree.unique_tokens <= limit:
        assert len(parts) == 1
    repeated = sum(len(part.ids) for part in parts) - tree.unique_tokens
    assert repeated >= len(tree.prompt) * len(parts)


def test_depth_first_visits_every_node_once_children_after_parents():
    tree = tree_of((45, 12, 25))
    order = depth_first(tree)
    assert sorted(order) == [n for n in range(len(tree)) if tree.alive(n) == n]
    at = {n: i for i, n in enumerate(order)}
    for n in order[1:]:
        siblings = tree.children(tree.parents[n])
        assert at[n] == at[tree.parents[n]] + 1 or siblings.index(n) > 0


@pytest.mark.parametrize("limit", [1, 7, 20])
def test_first_fit_fills_bins_up_to_the_limit(limit):
    rng = random.Random(limit)
    sizes = [rng.randint(1, 12) for _ in range(40)]
    bins = first_fit(sizes, limit)
    assert sorted(i for bin_ in bins for i in bin_) == list(range(40))
    loads = [sum(sizes[i] for i in bin_) for bin_ in bins]
    assert all(load <= limit or len(bin_) == 1 for bin_, load in zip(bins, loads, strict=True))
    open_ = [load for load in loads if load <= limit / 2]
    assert len(open_) <= 1


def test_padding_adds_tokens_that_see_themselves_only_and_count_nothing():
    packed = pack(pieces_of([flat_tree([((1, 2), 1.0), ((3,), 0.0)])]))
    longer = padded(packed, 9)
    assert packed.ids.tolist() == [7, 8, 1, 2, 3] and len(longer.ids) == 9
    assert longer.last[5:].tolist() == [5, 6, 7, 8] and int(longer.last[:5].max()) == 4
    for field in fields(Pack):
        before, after = getattr(packed, field.name), getattr(longer, field.name)
        assert after[: len(before)].tolist() == before.tolist()
        assert len(after) == (9 if len(before) == 5 else len(before))
