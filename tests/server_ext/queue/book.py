"""A journal on disk with a clock that is turned by hand."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server_ext.queue.journal import Journal

MANY = 10**9
_WHOLE = (
    "(SELECT trees.*, (SELECT prompt FROM prompts WHERE prompts.seq = trees.seq) AS prompt,"
    " (SELECT data FROM parts WHERE parts.seq = trees.seq AND part = 0) AS tree FROM trees)"
)


def rows(path: Path, columns: str = "state") -> dict[str, Any]:
    """{id: columns}, read past the journal; one column is not wrapped in a tuple. `tree` is the
    first part of its bytes."""
    with closing(sqlite3.connect(path)) as db:
        fetched = db.execute(f"SELECT id, {columns} FROM {_WHOLE} ORDER BY seq").fetchall()
    return {row[0]: row[1] if len(row) == 2 else row[1:] for row in fetched}


@dataclass
class Book:
    """The journal, and its rows read past it."""

    path: Path
    limits: dict[str, Any] = field(default_factory=dict)
    now: float = 1000.0
    boot: str = "this start of the machine"

    def __post_init__(self) -> None:
        self.journal = Journal(
            self.path, clock=lambda: self.now, boot=lambda: self.boot, **self.limits
        )

    def reopen(self, **limits: Any) -> Journal:
        self.journal.close()
        self.limits = limits or self.limits
        self.__post_init__()
        return self.journal

    def rows(self, columns: str = "state") -> dict[str, Any]:
        return rows(self.path, columns)

    def graded(self, *ids: str, size: int = 4) -> None:
        """Brings these to `graded`, in this order."""
        with self.journal.together():
            self.journal.submit([(i, b"prompt " + i.encode()) for i in ids])
            self.journal.take(len(ids))
            for i in ids:
                self.journal.store(i, i.encode().ljust(size, b"."))

    def leased(self, *ids: str, lease_s: float = 60.0) -> list[str]:
        self.graded(*ids)
        return [lease.lease_id for lease in self.journal.lease(len(ids), lease_s, MANY)]

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        columns = (
            "state, prompt, tree, failures, interruptions, returns, refusals, reasons, lease_id,"
            " lease_until, not_before, tree_bytes"
        )
        before = self.rows(columns)
        yield
        assert self.rows(columns) == before
