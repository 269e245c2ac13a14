"""The forest of common runs: every token once, the right ones shared, quickly."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from server_ext.attention import plan as plans
from server_ext.attention.plan import OPEN, Plan, forest
from tests.server_ext.attention.batches import Batch, Shape, batch


def read(of: Batch, plan: Plan) -> dict[int, list[int]]:
    """The slots that the plan reads for each sequence, in the order of positions."""
    assert sorted(plan.order) == list(range(len(of.rows)))
    slots: dict[int, list[int]] = {int(s): [] for s in plan.order}
    for row, begin, end, first, last in sorted(plan.runs.tolist(), key=lambda run: run[1]):
        for place in range(first, last + 1):
            sequence = int(plan.order[place])
            assert len(slots[sequence]) == begin
            stop = int(of.lengths[sequence]) if end == OPEN else end
            slots[sequence] += of.table[row, begin:stop].tolist()
    return slots


def tokens_read(of: Batch, plan: Plan) -> int:
    ends = [of.lengths[plan.order[run[3]]] if run[2] == OPEN else run[2] for run in plan.runs]
    return int(sum(ends) - plan.runs[:, 1].sum())


@pytest.mark.parametrize("seed", range(30))
def test_every_token_is_read_once(seed):
    rng = np.random.default_rng(seed)
    of = batch(rng, Shape(dim=1, v_dim=1), int(rng.integers(1, 60)), 90, page=[1, 16, 64][seed % 3])
    plan = forest(of.table, of.rows, of.lengths)
    exact = {i: of.table[r, : of.lengths[i]].tolist() for i, r in enumerate(of.rows)}
    assert read(of, plan) == exact
    tails = plan.runs[plan.runs[:, 2] == OPEN]
    assert sorted(tails[:, 3]) == list(range(len(of.rows))) and (tails[:, 3] == tails[:, 4]).all()


@pytest.mark.parametrize("seed", range(10))
def test_free_sharing_reads_each_prefix_once(monkeypatch, seed):
    monkeypatch.setattr(plans, "SEQUENCE_COST_TOKENS", 0)
    monkeypatch.setattr(plans, "RUN_COST_TOKENS", 0)
    rng = np.random.default_rng(seed)
    of = batch(rng, Shape(dim=1, v_dim=1), 40, 90)
    paths = [of.table[r, :n].tolist() for r, n in zip(of.rows, of.lengths, strict=True)]
    prefixes = {tuple(path[:i]) for path in paths for i in range(1, len(path) + 1)}
    assert tokens_read(of, forest(of.table, of.rows, of.lengths)) == len(prefixes)


def test_what_costs_more_than_it_saves_is_not_shared():
    table = torch.arange(4 * 100, dtype=torch.int32).reshape(4, 100)
    rows, lengths = np.arange(4), np.full(4, 100)
    table[1:, :10] = table[0, :10]  # four sequences: 3 x 10 tokens saved
    assert len(forest(table, rows, lengths).runs) == 4
    table[1:, :30] = table[0, :30]
    plan = forest(table, rows, lengths)
    assert plan.runs[0].tolist() == [plan.runs[0, 0], 0, 30, 0, 3] and len(plan.runs) == 5


def test_a_plan_holds_while_sequences_grow_and_not_when_slots_move():
    rng = np.random.default_rng(3)
    of = batch(rng, Shape(), 20, 200, shared=1.0)
    plan = forest(of.table, of.rows, of.lengths)
    closed = plan.runs[plan.runs[:, 2] != OPEN]
    assert len(closed)
    for _ in range(5):
        of.grow(rng)
        assert plan.holds(of.table, of.rows)
        assert read(of, plan) == {
            i: of.table[r, : of.lengths[i]].tolist() for i, r in enumerate(of.rows)
        }
    _, _, end, _, last = closed[-1]
    of.table[of.rows[plan.order[last]], end - 1] += 1
    assert not plan.holds(of.table, of.rows)


@pytest.mark.parametrize("kind", ["alone", "one prefix", "a chain of forks", "a tree"])
def test_time(kind):
    """256 sequences of 8,000 tokens in a millisecond (the best of some: the machine is shared)."""
    rng = np.random.default_rng(4)
    n, tokens = 256, 8000
    table = torch.from_numpy(rng.integers(0, 2**20, (n, tokens)).astype(np.int32))
    for i in range(1, n):
        common = {"alone": 0, "one prefix": 7990, "a chain of forks": 30 * i}
        depth = common.get(kind, int(rng.integers(tokens)))
        table[i, :depth] = table[i - 1, :depth]
    rows, lengths, times = np.arange(n), np.full(n, tokens), []
    for _ in range(20):
        start = time.perf_counter()
        plan = forest(table, rows, lengths)
        times.append(time.perf_counter() - start)
    assert (len(plan.runs) == n) == (kind == "alone")
    assert min(times) < 1e-3, times
