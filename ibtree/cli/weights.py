"""`ibtpo weights [status] | rollback | abort`: the weight versions of a server."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import Any

from ibtree.cli.output import Command, print_figures
from ibtree.client import Client
from ibtree.errors import FieldError
from ibtree.messages import KeptWeights


def _run(arguments: argparse.Namespace) -> None:
    if arguments.to is not None and arguments.what != "rollback":
        raise FieldError("to", "without rollback", "ibtpo weights rollback --to VERSION")
    if arguments.to is not None and not 0 < arguments.to < 2**63:
        raise FieldError("to", f"got {arguments.to}", "a kept version")
    {"status": _status, "rollback": _rollback, "abort": _abort}[arguments.what](arguments)


def _status(arguments: argparse.Namespace) -> None:
    with Client(arguments.server) as client:
        served = client.get_weights()
    figures: dict[str, Any] = asdict(served) | {"digest": served.digest.hex()}
    figures["file_bytes"] = served.kept[-1].file_bytes if served.kept else 0
    if arguments.json:
        figures["kept"] = [
            asdict(weights) | {"digest": weights.digest.hex()} for weights in served.kept
        ]
    else:
        del figures["kept"]
        now_s = time.time()
        figures |= {
            f"kept {weights.version}": _line(weights, now_s) for weights in reversed(served.kept)
        }
    print_figures(figures, arguments.json)


def _line(weights: KeptWeights, now_s: float) -> str:
    words = [weights.digest.hex()[:12], f"{weights.file_bytes} bytes"]
    if weights.base_version is not None:
        words.append(f"on {weights.base_version}")
    if weights.restored_version is not None:
        words.append(f"version {weights.restored_version} again")
    if weights.run_id:
        words.append(f"by run {weights.run_id}")
    return ", ".join([*words, f"since {now_s - weights.served_at_s:.0f} s"])


def _rollback(arguments: argparse.Namespace) -> None:
    with Client(arguments.server) as client:
        outcome = client.rollback_weights(arguments.to)
    print_figures(asdict(outcome) | {"digest": outcome.digest.hex()}, arguments.json)


def _abort(arguments: argparse.Namespace) -> None:
    with Client(arguments.server) as client:
        versions = client.abort_pushes()
    print_figures({"pushes_ended": len(versions), "versions": versions}, arguments.json)


def _options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "what",
        nargs="?",
        choices=("status", "rollback", "abort"),
        default="status",
        help="status (default): what is served and what is kept; rollback: serve a kept version's "
        "tensors again, under a new number; abort: end pushes whose bytes are still coming",
    )
    command.add_argument(
        "--to",
        type=int,
        metavar="VERSION",
        help="kept version to go back to; default: the newest that differs",
    )


COMMANDS: tuple[Command, ...] = (
    ("weights", "the weight versions of a server: look, go back, end a push", _run, _options),
)
