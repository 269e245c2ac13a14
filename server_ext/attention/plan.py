"""The plan of a batch: its slot tables cut into a forest of common runs, in plain int arrays.

Nothing in it is a CPU's: a GPU kernel can give each run to a group of thread blocks and merge by
log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from server_ext.attention import kernel

Ints = npt.NDArray[np.int64]
OPEN = -1
"""`end` of a run that reaches to the end of its sequence, however long that has become."""

SEQUENCE_COST_TOKENS = 6
RUN_COST_TOKENS = 16
"""Measured: what a run costs beside its tokens, for each sequence below it (its running softmax is
fetched and its last block is not full) and by itself, in tokens read for one sequence."""


@dataclass(frozen=True)
class Plan:
    """Which tokens are read for which sequences.

    `order` [n] int32: the sequences (places in the batch), so that each run covers a contiguous
    range of them. `runs` [r, 5] int32: row of the slot table, begin, end (positions; OPEN: to the
    end of the sequence), first and last place in `order`. Every token of a sequence is in exactly
    one of the runs that cover it; each sequence has one open run, perhaps still empty, so that the
    plan holds while every sequence grows at its end.
    """

    order: npt.NDArray[np.int32]
    runs: npt.NDArray[np.int32]

    def holds(self, table: torch.Tensor, rows: Ints) -> bool:
        """Whether the sequences still have the slots of the closed runs above them."""
        closed = self.runs[self.runs[:, 2] != OPEN]
        if not len(closed):
            return True
        return bool(
            kernel.library().forest_holds(
                table.data_ptr(),
                table.stride(0),
                rows.ctypes.data,
                self.order.ctypes.data,
                closed.ctypes.data,
                len(closed),
            )
        )


@dataclass(frozen=True)
class Queries:
    """The queries of a batch in a plan's order.

    `first` [n + 1] int32: each sequence's first one. `token` [q] int64: its row in the tensors of
    queries and outputs. `position` [q] int64: its token's position; it sees the keys up to there.
    """

    first: npt.NDArray[np.int32]
    token: Ints
    position: Ints


def unshared(rows: Ints) -> Plan:
    """A plan in which every sequence is read by itself. `rows` [n]: of the slot table."""
    n = len(rows)
    runs = np.zeros((n, 5), np.int32)
    runs[:, 0] = rows
    runs[:, 2] = OPEN
    runs[:, 3] = runs[:, 4] = np.arange(n)
    return Plan(np.arange(n, dtype=np.int32), runs)


def forest(table: torch.Tensor, rows: Ints, lengths: Ints) -> Plan:
    """The plan of sequences of `lengths` [n] tokens in `rows` [n] of the slot table [requests,
    positions] int32. Runs that would cost more than they save are left to their children."""
    n = len(rows)
    order, runs = np.empty(n, np.int32), np.empty((2 * n, 5), np.int32)
    count = kernel.library().plan_forest(
        table.data_ptr(),
        table.stride(0),
        rows.ctypes.data,
        lengths.ctypes.data,
        n,
        SEQUENCE_COST_TOKENS,
        RUN_COST_TOKENS,
        order.ctypes.data,
        runs.ctypes.data,
    )
    return Plan(order, runs[:count].copy())


def decode_queries(plan: Plan, lengths: Ints) -> Queries:
    """One query a sequence, at its last token."""
    order = plan.order.astype(np.int64)
    return Queries(np.arange(len(order) + 1, dtype=np.int32), order, lengths[order] - 1)


def extend_queries(plan: Plan, lengths: Ints, new: Ints) -> Queries:
    """The last `new` [n] tokens of each sequence, which lie one after another in the tensors."""
    order = plan.order.astype(np.int64)
    starts = np.cumsum(new) - new
    counts = new[order]
    first = np.zeros(len(order) + 1, np.int32)
    np.cumsum(counts, out=first[1:])
    within = np.arange(first[-1]) - np.repeat(first[:-1], counts)
    token = np.repeat(starts[order], counts) + within
    position = np.repeat((lengths - new)[order], counts) + within
    return Queries(first, token.astype(np.int64), position.astype(np.int64))
