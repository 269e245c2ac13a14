"""A process under the soak sees the clock that the harness sets, and a slow disk."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.fault.soak.control import Control

CHILD = """
import os, sys, tempfile, time
from grpc.aio._utils import _timeout_to_deadline
for _ in sys.stdin:
    begin = time.monotonic()
    with tempfile.NamedTemporaryFile() as file:
        os.fsync(file.fileno())
    took_s = time.monotonic() - begin
    print(time.time(), time.time_ns() / 1e9, _timeout_to_deadline(0.0), took_s, flush=True)
"""


def test_clock_and_disk_of_a_running_process(tmp_path: Path) -> None:
    control = Control(tmp_path / "control")
    with subprocess.Popen(
        [sys.executable, "-c", CHILD],
        env={**os.environ, **control.environment()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:

        def looked() -> tuple[list[float], float]:
            """Its clock's distance from ours, in three ways, and how long an fsync took. [s]"""
            assert child.stdin and child.stdout
            child.stdin.write("look\n")
            child.stdin.flush()
            *clocks, took_s = map(float, child.stdout.readline().split())
            return [round(clock - time.time(), -1) for clock in clocks], took_s

        assert looked()[0] == [0, 0, 0]
        control.shift_clock(3600)
        assert looked()[0] == [3600, 3600, 0], "gRPC's deadlines are of the real clock"
        control.shift_clock(-7200)
        control.slow_fsync(0.2)
        clocks, took_s = looked()
        assert clocks == [-3600, -3600, 0]
        assert took_s >= 0.2
        child.stdin.close()  # type: ignore[union-attr]
