"""`ibtpo queue | cache | audit-cache`: what the server holds, and holding its queue."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from ibtree.cli.output import Command, print_figures
from ibtree.client import Client
from ibtree.errors import FieldError


def _queue(arguments: argparse.Namespace) -> None:
    if arguments.reason and arguments.what not in ("pause", "drain"):
        raise FieldError("reason", f"with {arguments.what}", "ibtpo queue pause | drain")
    if arguments.wait_s is not None and arguments.what != "drain":
        raise FieldError("wait-s", f"with {arguments.what}", "ibtpo queue drain")
    with Client(arguments.server) as client:
        if arguments.what == "pause":
            client.pause_queue(arguments.reason)
        elif arguments.what == "resume":
            client.resume_queue()
        elif arguments.what == "drain":
            client.drain_queue(arguments.reason, wait_s=arguments.wait_s or 0.0)
        figures: dict[str, Any] = asdict(client.queue_stats())
    if not arguments.json:
        figures["held up by"] = "; ".join(figures.pop("holds")) or "nothing"
    print_figures(figures, arguments.json)


def _queue_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "what",
        nargs="?",
        choices=("status", "pause", "resume", "drain"),
        default="status",
        help="status (default); pause: no queued prompt begins to grow; resume: they do again; "
        "drain: pause, and wait until none grows. Each shows the queue afterwards",
    )
    command.add_argument("--reason", default="", help="of a pause or drain, for others to see")
    command.add_argument(
        "--wait-s", type=float, help="how long to wait for a drain, 0 to 600 s; default: 0"
    )


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
    ("queue", "trees by state, and pausing what is grown of them", _queue, _queue_options),
    ("cache", "how full the radix cache is, and of what", _cache, _no_options),
    (
        "audit-cache",
        "compare cached prefixes of growing trees with computed ones",
        _audit,
        _audit_options,
    ),
)
