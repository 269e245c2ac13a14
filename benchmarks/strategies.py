"""Strategies compared on the same problems: a table like the paper's Table 3."""

from __future__ import annotations

import math
import statistics
from typing import Any, NamedTuple

Rows = dict[str, dict[str, tuple[float, float]]]
"""Mean and half interval of each figure of each row."""
Columns = dict[str, list[float]]
"""Figures of each tree, by name."""


class Setting(NamedTuple):
    """A row of the table."""

    strategy: str
    shape: tuple[int, int, int, int]
    schedule: str = "rounds"

    @property
    def name(self) -> str:
        b0, rounds, k, b = self.shape
        g = b0 + (rounds - 1) * k * b
        schedule = "" if self.schedule == "rounds" else f", {self.schedule}"
        return f"{self.strategy} {g}{schedule}"

    def options(self, defaults: Any) -> Any:
        """TreeOptions of this row; all else is as in `defaults`."""
        from ibtree.tree.options import changed

        b0, rounds, k, b = self.shape
        return changed(
            defaults,
            strategy=self.strategy,
            schedule=self.schedule,
            init_rollouts=b0,
            rounds=rounds,
            branch_nodes=k,
            branch_rollouts=b,
        )


PAPER = (4, 9, 1, 1)


def figures_of(tree: Any) -> dict[str, float]:
    """A tree's figures. Eff-Rate is the share of trees whose rewards differ, Avg-Rate the mean
    reward of their trajectories; `first_rate` is that of the first round alone, on which no
    strategy has had an effect."""
    ledger = tree.ledger
    return {
        "G": tree.trajectories,
        "eff_rate": float(tree.rewards().std() > 0),
        "avg_rate": float(tree.rewards().mean()),
        "first_rate": tree.first_round_reward,
        "generated_tokens": ledger.generated_tokens,
        "unique_tokens": tree.unique_tokens,
        "cached_share": ledger.cached_tokens / ledger.prefix_tokens,
    }


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half its 95 % interval over trees, each of a problem of its own."""
    return statistics.mean(values), 1.96 * statistics.stdev(values) / math.sqrt(len(values))


def show(rows: Rows) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="per tree; mean ± half the 95 % interval over trees")
    shown.add_column("task and strategy")
    for column in next(iter(rows.values())):
        shown.add_column(column, justify="right")
    for row, values in rows.items():
        shown.add_row(row, *(f"{m:.4g} ± {h:.2g}" for m, h in values.values()))
    Console(width=200).print(shown)
