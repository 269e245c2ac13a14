"""A daemon's folder is its own while it runs."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ibtree.errors import FieldError


@contextmanager
def alone_in(folder: Path, field: str, daemon: str) -> Iterator[None]:
    """Makes the folder and keeps other processes out of it; a dead one keeps nobody out. Raises
    FieldError (of the setting `field`) if another `daemon` runs there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            problem = f"{folder} is in use by another {daemon}"
            raise FieldError(field, problem, "a folder of its own") from error
        yield
