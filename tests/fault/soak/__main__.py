"""`make soak-server`: prints what a soak found, and writes benchmarks/out/soak-server.json.

Exits 1 if a promise was broken or a figure was not reached.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests import ROOT
from tests.fault.soak.coverage import TREE_STATES, VERSION_STATES, Fault
from tests.fault.soak.run import Report, Soak, quantile
from tests.fault.soak.servers import RealServer, ToyServer

OUT = ROOT / "benchmarks" / "out" / "soak-server.json"
MOST_FOUND = 20
"""So many breaks of a promise are told in words."""
FEWEST_FAULTS, LEAST_SHARE = 200, 0.95


def main() -> None:
    parser = argparse.ArgumentParser(prog="make soak-server", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=40.0, help="of faults")
    parser.add_argument("--drain-minutes", type=float, default=4.0, help="to train on the rest")
    parser.add_argument("--folder", type=Path, help="keep logs and events there")
    parser.add_argument("--toy", action="store_true", help="an engine without a model")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # as Ctrl-C
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        soak = Soak(folder, arguments.seed, ToyServer() if arguments.toy else RealServer())
        times = {"for_s": 60 * arguments.minutes, "drain_s": 60 * arguments.drain_minutes}
        report = asyncio.run(soak.run(None, **times))
    told = figures(report, arguments.seed, soak.site.faults_left_out)
    show(report, told)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n")
    sys.exit(0 if reached(report) else 1)


def reached(report: Report) -> bool:
    """Whether every promise was kept, under enough faults in enough states."""
    enough = report.faults.total() >= FEWEST_FAULTS and report.coverage.share >= LEAST_SHARE
    return report.verdict.clean and enough


def figures(report: Report, seed: int, left_out: dict[Fault, str]) -> dict[str, object]:
    """What goes into the JSON file. Times are seconds."""
    verdict = report.verdict
    return {
        "seed": seed,
        **verdict.counts(),
        "faults": report.faults.total(),
        "cells_hit_share": report.coverage.share,
        "recovery_s_median": quantile(report.recovery_s, 0.5),
        "recovery_s_p95": quantile(report.recovery_s, 0.95),
        "stalls": dict(report.stalls),
        "faults_by_name": dict(report.faults),
        "prompts": dict(report.prompts),
        "server_ended_by": report.ended_by,
        "cells_missed": [f"{fault} × {state}" for fault, state in report.coverage.missing()],
        "faults_left_out": left_out,
        "found": {name: found[:MOST_FOUND] for name, found in vars(verdict).items() if found},
    }


def show(report: Report, told: dict[str, object]) -> None:
    """The table of cells, and the figures."""
    console = Console(width=160)
    table = Table("fault", title="Faults × states of trees and of the newest weight version: hits")
    for state in (*TREE_STATES, *VERSION_STATES):
        table.add_column(state, justify="right")
    for row in report.coverage.rows():
        table.add_row(*row)
    console.print(table)
    console.print_json(json.dumps(told))


if __name__ == "__main__":
    main()
