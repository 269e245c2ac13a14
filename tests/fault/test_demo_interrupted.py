"""Ctrl-C or SIGTERM, early or late in the demo, leaves no process (`make soak`: many moments)."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests import ROOT

SOAK = os.environ.get("IBTPO_SOAK") == "1"
MOMENTS_S = [random.Random(1).uniform(0.2, 60.0) for _ in range(15)] if SOAK else [1.0, 9.0]
EXITS = {signal.SIGINT: {1}, signal.SIGTERM: {143, -signal.SIGTERM}}
"""By signal; SIGTERM is only taken over while something runs."""


def marked(mark: str) -> list[str]:
    """Command lines of the live processes that inherited the mark in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it ended meanwhile, or is another's
    return found


@pytest.mark.parametrize("number", EXITS)
@pytest.mark.parametrize("moment_s", MOMENTS_S)
def test_nothing_is_left_running(tmp_path: Path, moment_s: float, number: signal.Signals) -> None:
    mark = f"IBTPO_MARK={uuid.uuid4().hex}"
    name, value = mark.split("=")
    demo = subprocess.Popen(
        [sys.executable, ROOT / "examples/arith/demo.py", f"--out={tmp_path / 'demo'}"],
        env={**os.environ, name: value},
        start_new_session=True,
        # what a shell starts in the background, and all below it, would ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            demo.wait(moment_s)
        assert marked(mark)
        demo.send_signal(number)
        assert demo.wait(60) in EXITS[number]
        assert marked(mark) == []
    finally:
        demo.kill()
