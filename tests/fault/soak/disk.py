"""A small disk that can be filled up."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Self


class SmallDisk:
    """A tmpfs at `path`, if this process may mount one; else a plain folder, which cannot be
    filled, and `problem` says why."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path, self.problem = path, ""
        self._size, self._filler = size_bytes, path / "filler"

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={self._size}", "tmpfs", str(self.path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
            self.problem = done.stderr.strip()
        except OSError as error:
            self.problem = str(error)
        return self

    def __exit__(self, *_: object) -> None:
        if not self.problem:
            subprocess.run(["umount", "--lazy", str(self.path)], check=True)

    def fill(self) -> None:
        """Leaves no room."""
        assert not self.problem
        with self._filler.open("ab") as file, suppress(OSError):
            while True:
                os.write(file.fileno(), bytes(1024 * 1024))
        with self._filler.open("ab") as file, suppress(OSError):
            while True:  # and the rest, which a whole MiB did not fit into
                os.write(file.fileno(), bytes(4096))

    def free(self) -> None:
        self._filler.unlink(missing_ok=True)
