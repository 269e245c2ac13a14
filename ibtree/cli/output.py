"""How the commands print: a table or one JSON object, and text that a terminal can bear."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from ibtree.text import printable

Command = tuple[
    str,
    str,
    Callable[[argparse.Namespace], None],
    Callable[[argparse.ArgumentParser], None],
]
"""A command: its name, what it does, how it runs, and what adds its options."""


def print_json(figures: dict[str, Any]) -> None:
    print(json.dumps(figures, allow_nan=False))


def print_figures(figures: dict[str, Any], as_json: bool) -> None:
    """Prints names and values."""
    if as_json:
        print_json(figures)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False)
    for name, value in figures.items():
        shown = f"{value:.4g}" if isinstance(value, float) else printable(str(value))
        table.add_row(name, Text(shown))
    Console().print(table)
