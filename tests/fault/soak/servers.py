"""The servers that can be put under a soak: the real one, and one without a model."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from processes import MODEL, server_command

from tests import ROOT
from tests.fault.soak.coverage import Fault

GRACE_S = 3.0
REWARD_TIMEOUT_S = 2.0
OPEN_TREES = 3
MAX_RETURNS = 2


class Server(Protocol):
    """How a server is started, and where its things lie."""

    left_out: dict[Fault, str]
    """Faults that it cannot have, and why."""

    def command(self, data: Path, rewards: str, port: int, weight_switch: str) -> list[str]:
        """`rewards`: address of the reward service; `port`: 0 takes a free one."""
        ...

    def journal(self, data: Path) -> Path: ...

    def model_file(self, data: Path) -> Path: ...


class RealServer:
    """ibtpo-server with the arith model, on the CPU."""

    left_out: dict[Fault, str] = {}  # noqa: RUF012

    def command(self, data: Path, rewards: str, port: int, weight_switch: str) -> list[str]:
        return server_command(
            data,
            "--grader=remote",
            f"--reward-address={rewards}",
            f"--reward-timeout-s={REWARD_TIMEOUT_S:g}",
            f"--max-open-trees={OPEN_TREES}",
            f"--max-returns={MAX_RETURNS}",
            "--keep-weights=3",
            f"--shutdown-grace-s={GRACE_S:g}",
            f"--weight-switch={weight_switch}",
            f"--min-free-bytes={8 * 1024**2}",
            port=port,
        )

    def journal(self, data: Path) -> Path:
        return data / "journal.sqlite"

    def model_file(self, data: Path) -> Path:
        return MODEL / "model.safetensors"


@dataclass
class ToyServer:
    """The real queue, trees, weights and services around an engine without a model (toy_server.py),
    with one of its bugs if `bug` names one."""

    bug: str = ""

    left_out = dict.fromkeys(
        (Fault.SCHEDULER_STOPPED, Fault.ENGINE_KILLED), "the toy engine has no process of its own"
    )

    def command(self, data: Path, rewards: str, port: int, weight_switch: str) -> list[str]:
        # without an environment of its own: it comes with the one that turns its clock
        python = [sys.executable, "-m", f"{__package__}.toy_server"]
        return [*python, str(data), str(port), rewards, weight_switch, self.bug]

    def journal(self, data: Path) -> Path:
        return data / "j.sqlite"

    def model_file(self, data: Path) -> Path:
        return data / "model" / "model.safetensors"


def module(name: str, *arguments: str) -> list[str]:
    """The command line of a module beside this one."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    python = ["env", f"PYTHONPATH={paths}", sys.executable, "-m"]
    return [*python, f"{__package__}.{name}", *arguments]
