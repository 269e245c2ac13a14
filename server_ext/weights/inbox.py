"""The files of pushes in progress. What came of one outlives the stream that brought it.

announced ──▶ receiving ──▶ received
                  │
                  ├──▶ broken off   its file stays, until another push begins or breaks off
                  └──▶ ended        by a newer push, a rollback, an operator; its file goes

Each has a file of its own, so nobody waits for a sender.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ibtree.errors import FieldError
from ibtree.weights.manifest import WeightManifest
from server_ext.errors import BrokenPushError, BusyError, PushEndedError

_GRACE_S = 0.05
_MOST_RECEIVING = 4
"""Each may take as much of the disk as a whole version."""
_RETRY_AFTER_S = 10.0
_WRITE_BYTES = 512 * 1024
T = TypeVar("T")
Source = Callable[[int], AsyncIterator[bytes]]
"""Brings a file: called with the first byte that is wanted, gives the rest in order, verified."""


@dataclass(eq=False)
class _Part:
    """A file that is not whole yet: the first `size` bytes are there."""

    path: Path
    size: int = 0
    spoiled: bool = False


class _Writer:
    """Appends to a part: a thread writes what came before while more comes."""

    def __init__(self, part: _Part) -> None:
        self._part, self._chunks, self._size = part, list[bytes](), 0
        self._writing: asyncio.Future[int] | None = None

    async def add(self, chunk: bytes) -> None:
        """Raises OSError if the disk did not take what came before."""
        self._chunks.append(chunk)
        self._size += len(chunk)
        if self._size >= _WRITE_BYTES:
            await self._written()
            self._write()

    async def finish(self) -> None:
        """Returns when all is in the file. Raises OSError."""
        await self._written()
        if self._chunks and not self._part.spoiled:
            self._write()
            await self._written()

    def _write(self) -> None:
        work = asyncio.to_thread(_append, self._part.path, self._part.size, tuple(self._chunks))
        self._writing = asyncio.ensure_future(work)
        self._chunks.clear()
        self._size = 0

    async def _written(self) -> None:
        if self._writing is None:
            return
        await asyncio.wait({self._writing})  # who is cancelled here comes back in `finish`
        writing, self._writing = self._writing, None
        try:
            self._part.size += writing.result()
        except OSError:
            self._part.spoiled = True
            raise


@dataclass(eq=False)
class _Receiving:
    """A push whose bytes are on their way."""

    manifest: WeightManifest
    key: tuple[object, ...]
    task: asyncio.Task[Any]
    over: asyncio.Event = field(default_factory=asyncio.Event)
    ended_by: str = ""
    takes_over: bool = False
    """Whether who ended it goes on with its file."""

    def end(self, by: str, *, takes_over: bool = False) -> None:
        if not self.ended_by:
            self.ended_by, self.takes_over = by, takes_over
            self.task.cancel()


class Inbox:
    """Receives pushes beside each other; a newer version ends the older ones."""

    def __init__(self, folder: Path, spare: Path, idle_timeout_s: float) -> None:
        """`spare`: a file that may be written over instead of making one anew, if it is there and
        of like size. `idle_timeout_s`: how long a sender may send nothing."""
        self._folder, self._spare = folder, spare
        self.idle_timeout_s = idle_timeout_s
        self._receiving: list[_Receiving] = []
        self._broken_off: dict[tuple[object, ...], _Part] = {}
        self._count = 0

    async def receive(self, manifest: WeightManifest, source: Source) -> Path:
        """Returns the whole file, which is the caller's now.

        Raises FieldError if it has another size, BrokenPushError if nothing comes for too long, and
        what the source raises: then the same manifest's next push goes on where this one stopped.
        Raises PushEndedError if it is ended, BusyError if too many are under way.
        """
        key = (manifest.version, manifest.digest, manifest.base_digest, manifest.file_bytes)
        await self._make_way(manifest, key)
        task = asyncio.ensure_future(self._received(manifest.file_bytes, key, source))
        receiving = _Receiving(manifest, key, task)
        self._receiving.append(receiving)
        try:
            return await task
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            if receiving.ended_by and not receiving.takes_over:
                await self._remove_broken_off(lambda other: other == key)
            if receiving.ended_by:
                problem = f"version {manifest.version}: {receiving.ended_by} ended this push"
                raise PushEndedError(problem) from None
            raise
        finally:
            self._receiving.remove(receiving)
            receiving.over.set()

    def end(self, by: str, version: int | None = None) -> list[int]:
        """Ends the pushes that are still on their way, or those of one version; returns the
        versions."""
        chosen = [r for r in self._receiving if version in (None, r.manifest.version)]
        for receiving in chosen:
            receiving.end(by)
        return [receiving.manifest.version for receiving in chosen]

    async def _make_way(self, manifest: WeightManifest, key: tuple[object, ...]) -> None:
        """Ends what this push makes idle, and waits for what it can go on from."""
        for other in list(self._receiving):
            if other.manifest.version < manifest.version:
                other.end(f"a push of version {manifest.version}")
            elif other.key == key:  # the same bytes: perhaps a stream that nobody feeds any more
                if manifest.run_id and manifest.run_id == other.manifest.run_id:
                    other.end("another push of the same by its own run", takes_over=True)
                await other.over.wait()
        if sum(not other.ended_by for other in self._receiving) >= _MOST_RECEIVING:
            versions = ", ".join(str(other.manifest.version) for other in self._receiving)
            problem = f"pushes of versions {versions} are on their way already"
            raise BusyError(f"{problem}; `ibtpo weights abort` ends them", _RETRY_AFTER_S)

    async def _received(self, limit: int, key: tuple[object, ...], source: Source) -> Path:
        part = self._broken_off.pop(key, None)
        await self._remove_broken_off(lambda _: True)
        if part is None or not part.path.is_file():
            self._count += 1
            part = _Part(self._folder / f"receiving-{self._count}.part")
        try:
            if not part.size:
                await self._make_room(part, limit)
            await self._fill(part, limit, source)
        except BaseException:
            if part.spoiled:
                await in_thread(remove, part.path)
            else:
                await self._remove_broken_off(lambda _: True)
                self._broken_off[key] = part
            raise
        return part.path

    async def _fill(self, part: _Part, limit: int, source: Source) -> None:
        loop, writer, at = asyncio.get_running_loop(), _Writer(part), part.size
        try:
            async with asyncio.timeout(self.idle_timeout_s) as idle:
                try:
                    async for chunk in source(at):
                        at += len(chunk)
                        if at > limit:
                            part.spoiled = True
                            problem = f"more than {limit} bytes"
                            raise FieldError("chunk", problem, "the announced size")
                        idle.reschedule(None)  # our disk's time is not the sender's
                        await writer.add(chunk)
                        idle.reschedule(loop.time() + self.idle_timeout_s)
                    idle.reschedule(None)
                finally:
                    await writer.finish()
        except TimeoutError as error:
            if not idle.expired():
                raise
            problem = f"nothing came of this push for {self.idle_timeout_s:g} s after byte {at}"
            raise BrokenPushError(f"{problem}; push again") from error
        if at != limit:
            await asyncio.sleep(_GRACE_S)  # one that broke may look the same: it is cancelled here
            part.spoiled = True
            raise FieldError("chunk", f"the stream ended after {at} bytes", f"{limit}")

    async def _make_room(self, part: _Part, size: int) -> None:
        """Takes the room that the file needs at once. Raises OSError if the disk has not got it."""
        part.spoiled = True  # until there is one
        await in_thread(_made_room, part.path, self._spare, size)
        part.spoiled = False

    async def _remove_broken_off(self, which: Callable[[tuple[object, ...]], bool]) -> None:
        for key in [key for key in self._broken_off if which(key)]:
            await in_thread(remove, self._broken_off.pop(key).path)


async def in_thread(work: Callable[..., T], *args: Any) -> T:
    """Like asyncio.to_thread, but who is cancelled waits for the thread: its file is used again."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *args))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        if not running.cancelled():
            running.exception()  # nobody else will look
        raise


def _made_room(path: Path, spare: Path, size: int) -> None:
    with suppress(FileNotFoundError):
        if size / 2 <= spare.stat().st_size <= size * 2:
            spare.replace(path)
    try:
        _allocate(path, size)
    except OSError:  # on a full disk it leaves what there was
        spare.unlink(missing_ok=True)
        _allocate(path, size)


def _allocate(path: Path, size: int) -> None:
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
        file.truncate(size)
        os.posix_fallocate(file.fileno(), 0, size)


def _append(path: Path, at: int, chunks: tuple[bytes, ...]) -> int:
    with path.open("r+b", buffering=0) as file:
        file.seek(at)
        for chunk in chunks:
            left = memoryview(chunk)
            while left:
                left = left[file.write(left) :]
    return sum(map(len, chunks))


def remove(*paths: Path) -> None:
    """Removes files that are of no use any more."""
    for path in paths:
        with suppress(OSError):  # removed when the store is opened again
            path.unlink(missing_ok=True)
