"""Files that a learner left in a shared folder instead of sending them."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ibtree.errors import FieldError, PreconditionError
from ibtree.weights.manifest import CHUNK_BYTES
from server_ext.weights.inbox import Source

_FIELD = "shared_path"


class SharedFolder:
    """Reads regular files below one folder, through no symbolic link."""

    def __init__(self, root: Path | None) -> None:
        self._root = root

    def source(self, path: str) -> Source:
        """Raises PreconditionError without a folder, FieldError for a path that leaves it."""
        root = self._root
        if root is None:
            raise PreconditionError(
                f"{_FIELD}: this server has no shared folder (--shared-dir); send the bytes"
            )
        names = PurePosixPath(path).parts
        if not names or path.startswith("/") or ".." in names or "\0" in path:
            raise FieldError(_FIELD, f"{path!r}", "a path inside the shared folder, relative to it")

        async def chunks(start: int) -> AsyncIterator[bytes]:
            with await asyncio.to_thread(_opened, root, names) as file:
                file.seek(start)
                while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                    yield chunk

        return chunks


def _opened(root: Path, names: tuple[str, ...]) -> BinaryIO:
    """Opens one name after the other, so that no link on the way is followed."""
    try:
        at = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise PreconditionError(
            f"{_FIELD}: the shared folder cannot be opened ({error.strerror}); send the bytes"
        ) from error
    try:
        for name in names[:-1]:
            folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = folder
        # NONBLOCK: a pipe must not hang the server
        handle = os.open(names[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
    except OSError as error:
        problem = f"{'/'.join(names)} cannot be opened ({error.strerror})"
        raise FieldError(_FIELD, problem, "a file in the shared folder, no link") from error
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise FieldError(_FIELD, f"{'/'.join(names)} is no file", "a file in the shared folder")
    return os.fdopen(handle, "rb")
