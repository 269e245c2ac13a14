"""Turns the wall clock, and slows down the disk, of a running server (inside/sitecustomize.py)."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from tests import ROOT

_FORMAT = "dd"
INSIDE = Path(__file__).parent / "inside"
"""Goes first on the server's PYTHONPATH."""


class Control:
    """What a server's processes read, at once, from a file that they map."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.clock_shift_s = self.fsync_s = 0.0
        path.write_bytes(struct.pack(_FORMAT, 0.0, 0.0))

    def environment(self) -> dict[str, str]:
        """What the environment of a process that is to read it needs besides the usual."""
        paths = [str(INSIDE), str(ROOT), os.environ.get("PYTHONPATH", "")]
        return {
            "IBTPO_SOAK_CONTROL": str(self._path),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }

    def shift_clock(self, seconds: float) -> None:
        """Steps the wall clock, on top of the steps before. [s]"""
        self.clock_shift_s += seconds
        self._write()

    def slow_fsync(self, seconds: float) -> None:
        """How long each fsync takes at least, from now on. [s]"""
        self.fsync_s = seconds
        self._write()

    def _write(self) -> None:
        with self._path.open("r+b") as file:  # the mapping shows this inode
            file.write(struct.pack(_FORMAT, self.clock_shift_s, self.fsync_s))
