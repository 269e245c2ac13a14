"""The memory of the demo's processes, and those that a demo which was killed left behind."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil


class Memory:
    """The greatest proportional memory of the processes and all they started [bytes]. Their ids are
    noted in the run's folder."""

    def __init__(self, out: Path, *pids: int) -> None:
        self._note, self._pids = out / "processes.json", [*pids]
        self.peak_bytes = 0
        self._write()

    def add(self, pid: int) -> None:
        self._pids.append(pid)
        self._write()

    def _write(self) -> None:
        self._note.write_text(json.dumps(self._pids))

    def look(self) -> None:
        total = 0
        for pid in self._pids:
            with suppress(psutil.Error):
                root = psutil.Process(pid)
                for process in (root, *root.children(recursive=True)):
                    with suppress(psutil.Error):
                        total += process.memory_full_info().pss
        self.peak_bytes = max(self.peak_bytes, total)


def stop_leftovers(out: Path) -> None:
    """Ends the server and learner of this folder that a killed demo left running."""
    note = out / "processes.json"
    for pid in json.loads(note.read_text()) if note.is_file() else []:
        with suppress(psutil.Error, ProcessLookupError):
            if str(out) in " ".join(psutil.Process(pid).cmdline()):
                os.kill(pid, signal.SIGTERM)
                _wait(pid)


def _wait(pid: int) -> None:
    until = time.monotonic() + 60
    while psutil.pid_exists(pid) and time.monotonic() < until:
        time.sleep(0.2)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
