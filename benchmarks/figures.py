"""How a benchmark tells its figures: a table, and a JSON file beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def show(title: str, figures: Mapping[str, float], out: Path) -> None:
    """Prints a row a figure and writes `out`."""
    from rich.console import Console  # not in SGLang's children, which import the benchmark again
    from rich.table import Table

    table = Table("figure", title=title)
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}")
    Console().print(table)
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(figures, indent=2) + "\n")
