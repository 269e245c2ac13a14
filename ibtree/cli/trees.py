"""`ibtpo trees [list] | revive | purge | cancel`: the trees in a server's journal."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ibtree.cli.output import Command, print_figures, print_json
from ibtree.client import Client
from ibtree.errors import FieldError
from ibtree.messages import TreeChoice, TreeEntry
from ibtree.text import printable

_PAGE = 200
_STATES = ("queued", "growing", "graded", "leased", "acked", "dead")
_PURGEABLE = ("dead", "graded", "acked")


def _run(arguments: argparse.Namespace) -> None:
    what = arguments.what
    if what == "list":
        if arguments.id or arguments.all:
            raise FieldError("id", "with list", "--state, --run and --limit")
        return _list(arguments)
    choice = TreeChoice(tuple(arguments.id or ()), arguments.run_id, arguments.all)
    if (bool(choice.ids), choice.run is not None, choice.all).count(True) != 1:
        raise FieldError("id", f"{what} needs to know which", "exactly one of --id, --run, --all")
    if arguments.state and what != "purge":
        raise FieldError("state", f"with {what}", "list and purge only")
    with Client(arguments.server) as client:
        if what == "revive":
            figures = {"revived": client.revive_trees(choice)}
        elif what == "cancel":
            figures = {"cancelled": client.cancel_prompts(choice)}
        else:
            figures = {"purged": client.purge_trees(choice, _purged(arguments.state))}
    print_figures(figures, arguments.json)
    return None


def _purged(state: str | None) -> str:
    state = state or "dead"
    if state not in _PURGEABLE:
        raise FieldError("state", f"{state} trees are in use", " | ".join(_PURGEABLE))
    return state


def _list(arguments: argparse.Namespace) -> None:
    if arguments.limit < 1:
        raise FieldError("limit", f"got {arguments.limit}", "1 or more")
    entries: list[TreeEntry] = []
    more = True
    with Client(arguments.server) as client:
        while more and len(entries) < arguments.limit:
            after = entries[-1].number if entries else 0
            count = min(arguments.limit - len(entries), _PAGE)
            page, more = client.list_trees(
                arguments.state, arguments.run_id, after=after, max_trees=count
            )
            entries += page
    if arguments.json:
        print_json({"trees": [asdict(entry) for entry in entries], "more": more})
        return
    _print(entries)
    if more:
        print(f"more follow; --limit {2 * arguments.limit} shows them")


def _print(entries: list[TreeEntry]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("id", "state", "age", "counted", "bytes", "last reason")
    for entry in entries:
        counted = f"{entry.failures} failed, {entry.refusals} bad"
        reason = printable(entry.reasons[-1]) if entry.reasons else ""
        cells = (
            printable(entry.id),
            f"{entry.state}{_when(entry)}",
            f"{entry.age_s:.0f} s",
            counted,
            str(entry.tree_bytes),
            reason[:200],
        )
        table.add_row(*map(Text, cells))
    Console().print(table)


def _when(entry: TreeEntry) -> str:
    if entry.rests_s is not None:
        return f", rests {entry.rests_s:.0f} s"
    return "" if entry.lease_left_s is None else f", {entry.lease_left_s:.0f} s left"


def _options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "what",
        nargs="?",
        choices=("list", "revive", "purge", "cancel"),
        default="list",
        help="list (default): what is there, and why it came back; revive: queue dead prompts "
        "again; purge: forget trees, dead ones unless --state; cancel: forget prompts that are "
        "queued or growing",
    )
    command.add_argument("--state", choices=_STATES, help="trees in this state alone")
    command.add_argument("--run", dest="run_id", metavar="RUN", help="trees of this run alone")
    command.add_argument("--id", action="append", metavar="ID", help="this one; may be repeated")
    command.add_argument("--all", action="store_true", help="all there are")
    command.add_argument("--limit", type=int, default=100, help="most trees to list (100)")


COMMANDS: tuple[Command, ...] = (
    ("trees", "trees in the journal: list, revive, purge, cancel", _run, _options),
)
