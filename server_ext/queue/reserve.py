"""Room that is kept for the day on which the disk is full.

Acking and leasing need little of it, but some: without any, a full disk could not even be told
that trees are done with, and their room would never come back.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from server_ext.queue.volume import free_bytes

RESERVE_BYTES = 4 * 1024 * 1024


class Reserve:
    """A file of `RESERVE_BYTES` beside the journal that says nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / "journal.reserve"

    def give(self) -> bool:
        """Gives the room back to the disk; whether there was any."""
        try:
            held = self._path.stat().st_size
            self._path.unlink()
        except OSError:
            return False
        return held > 0

    def take(self) -> None:
        """Takes the room, if there is twice as much and it is not taken yet."""
        with suppress(OSError):
            if self._path.exists() or free_bytes(self._folder) < 2 * RESERVE_BYTES:
                return
            with self._path.open("wb") as file:
                try:
                    os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
                except OSError:
                    self._path.unlink()
                    raise
