"""The file of a push in progress. What is in it outlives the stream that brought it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from ibtree.errors import FieldError
from ibtree.weights.manifest import WeightManifest

_GRACE_S = 0.05
Source = Callable[[int], AsyncIterator[bytes]]
"""Brings a file: called with the first byte that is wanted, gives the rest in order, verified."""


class Inbox:
    """Receives one push at a time."""

    def __init__(self, path: Path, spare: Path) -> None:
        """`spare`: a file that may be written over instead of making `path` anew, if it is there
        and of like size."""
        self._path, self._spare = path, spare
        self._key: tuple[object, ...] = ()
        self._size = 0

    async def receive(self, manifest: WeightManifest, source: Source) -> None:
        """Returns when the whole file is here. Raises FieldError if it has another size, and what
        the source raises: then the same manifest's next push goes on where this one stopped."""
        key = (manifest.version, manifest.digest, manifest.base_digest, manifest.file_bytes)
        if key != self._key or not self._path.is_file():
            self.forget()
        self._key, limit = key, manifest.file_bytes
        if not self._size:
            self._make_room(limit)
        with self._path.open("r+b") as file:
            file.seek(self._size)
            async for chunk in source(self._size):
                if self._size + len(chunk) > limit:
                    self.forget()
                    raise FieldError("chunk", f"more than {limit} bytes", "the announced size")
                self._add(file, chunk)
        if self._size != limit:
            await asyncio.sleep(_GRACE_S)  # one that broke may look the same: it is cancelled here
            problem = f"the stream ended after {self._size} bytes"
            self.forget()
            raise FieldError("chunk", problem, f"{limit}")

    def _make_room(self, size: int) -> None:
        with suppress(FileNotFoundError):
            if size / 2 <= self._spare.stat().st_size <= size * 2:
                self._spare.replace(self._path)
        try:
            self._allocate(size)
        except OSError:
            self._spare.unlink(missing_ok=True)
            try:
                self._allocate(size)
            except OSError:
                self.forget()  # on a full disk it leaves what there was
                raise

    def _allocate(self, size: int) -> None:
        with os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            file.truncate(size)
            os.posix_fallocate(file.fileno(), 0, size)

    def _add(self, file: BinaryIO, chunk: bytes) -> None:
        try:
            file.write(chunk)  # 2 MiB into the page cache; a thread could outlive the push
            file.flush()
        except OSError:  # unlike the source's, which leave what is here
            self.forget()
            raise
        self._size += len(chunk)

    def forget(self) -> None:
        """Removes the file: it was used, or is no good."""
        with suppress(OSError):  # overwritten by the next push then
            self._path.unlink(missing_ok=True)
        self._key, self._size = (), 0
