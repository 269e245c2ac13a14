"""`ibtpo queue | cache | audit-cache`: what the server holds."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ibtree.cli.output import Command, print_figures
from ibtree.client import Client


def _queue(arguments: argparse.Namespace) -> None:
    with Client(arguments.server) as client:
        figures = asdict(client.queue_stats())
    if not arguments.json:
        figures["held up by"] = ", ".join(figures.pop("holds")) or "nothing"
    print_figures(figures, arguments.json)


def _cache(arguments: argparse.Namespace) -> None:
    with Client(arguments.server) as client:
        print_figures(asdict(client.cache_state()), arguments.json)


def _audit(arguments: argparse.Namespace) -> None:
    with Client(arguments.server) as client:
        print_figures(asdict(client.audit_cache(arguments.samples)), arguments.json)


def _no_options(command: argparse.ArgumentParser) -> None:
    pass


def _audit_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--samples", type=int, default=32, help="prefixes, 1 to 1,024")


COMMANDS: tuple[Command, ...] = (
    ("queue", "trees by state: queued, growing, graded, leased, acked, dead", _queue, _no_options),
    ("cache", "how full the radix cache is, and of what", _cache, _no_options),
    (
        "audit-cache",
        "compare cached prefixes of growing trees with computed ones",
        _audit,
        _audit_options,
    ),
)
