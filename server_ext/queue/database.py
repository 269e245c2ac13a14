"""The journal's file: opened, written in transactions, and what its errors mean."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ibtree.errors import IbtpoError
from server_ext.errors import DiskFullError, JournalAwayError, JournalDamagedError
from server_ext.queue import clock
from server_ext.queue.reserve import Reserve
from server_ext.queue.schema import prepare
from server_ext.queue.states import WAYS, State
from server_ext.queue.volume import check_volume, free_bytes

_log = logging.getLogger(__name__)
_MOST_REASONS, _MOST_REASON_CHARACTERS = 8, 500
_NO_ROOM_BYTES = 64 * 1024
"""With so little left on the disk, a failed write is for lack of room whatever SQLite calls it."""
_WAL_BYTES = 16 * 1024 * 1024
_CACHE_KIB = 32 * 1024
_VACUUM_PAGES = 512
_SLACK_PAGES = 4096
"""Free pages that the file may keep, for what comes next; more go back to the disk."""


class Database:
    """One connection, for one thread at a time. `now` counts seconds since `boot`.

    Raises FieldError for a file or a volume that cannot be used, DiskFullError.
    """

    def __init__(
        self,
        path: Path,
        now: Callable[[], float] = clock.now_s,
        boot: Callable[[], str] = clock.boot,
    ) -> None:
        self._path, self.now, self._boot = path, now, boot
        path.parent.mkdir(parents=True, exist_ok=True)
        check_volume(path.parent)
        self._reserve = Reserve(path.parent)
        self._reserve.give()  # the start frees before it writes
        self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._begun = False
        """Whether what an earlier server left behind was put right; a full disk puts it off."""
        try:
            with self._own_errors():
                prepare(self.connection, path)
                for setting in (
                    "journal_mode = WAL",
                    "temp_store = MEMORY",
                    f"journal_size_limit = {_WAL_BYTES}",
                    f"cache_size = -{_CACHE_KIB}",
                ):
                    self.connection.execute(f"PRAGMA {setting}").fetchall()
        except BaseException:
            self.connection.close()
            raise
        try:
            with self._own_errors():
                self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            with self.transaction():
                pass
        except DiskFullError as error:
            _log.warning("%s", error)
        self._reserve.take()

    def close(self) -> None:
        self.connection.close()

    @contextmanager
    def transaction(self, *, synced: bool = True) -> Iterator[None]:
        """BEGIN IMMEDIATE … COMMIT, or ROLLBACK when something is raised inside; inside another
        one a part of it that can fail by itself. `synced`: it survives a power failure; else only
        the death of the process.

        Raises DiskFullError, JournalAwayError and JournalDamagedError, with nothing changed.
        """
        with self._own_errors():
            if self.connection.in_transaction:
                begin, commit, undo = "SAVEPOINT inner", "RELEASE inner", "ROLLBACK TO inner"
            else:
                begin, commit, undo = "BEGIN IMMEDIATE", "COMMIT", "ROLLBACK"
                # asking costs as much as setting
                self.connection.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}")
            self.connection.execute(begin)
            try:
                if not self._begun:
                    self._begin()
                yield
                self.connection.execute(commit)
            except BaseException:
                if self.connection.in_transaction:  # SQLite itself rolls back on a full disk
                    self.connection.execute(undo)
                raise
            self._begun = self._begun or commit == "COMMIT"

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """Turns SQLite's errors into the house's."""
        try:
            yield
        except sqlite3.Error as error:
            if (told := self._error(error)) is None:
                raise
            raise told from error

    def _error(self, error: sqlite3.Error) -> IbtpoError | None:
        folder, code = self._path.parent, getattr(error, "sqlite_errorcode", None)
        kind = None if code is None else code & 0xFF
        if kind == sqlite3.SQLITE_FULL or (
            kind in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
            and free_bytes(folder) < _NO_ROOM_BYTES
        ):
            return DiskFullError(f"the disk of {folder} is full ({error}); nothing was taken")
        if kind in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return JournalDamagedError(f"the journal in {folder} is damaged ({error})")
        if kind in (
            sqlite3.SQLITE_IOERR,
            sqlite3.SQLITE_CANTOPEN,
            sqlite3.SQLITE_BUSY,
            sqlite3.SQLITE_LOCKED,
            sqlite3.SQLITE_READONLY,
        ):
            return JournalAwayError(f"the journal in {folder} cannot be written now ({error})")
        return None

    def give_reserve(self) -> bool:
        """Gives up the room that was kept for this; whether there was any."""
        given = self._reserve.give()
        if given:
            _log.warning("the disk of %s is full; the reserve is given up", self._path.parent)
        return given

    def free_bytes(self) -> int:
        """Room on the journal's disk, and in the file itself."""
        inside = self.value("PRAGMA freelist_count") * self.value("PRAGMA page_size")
        self._reserve.take()
        return free_bytes(self._path.parent) + int(inside)

    def _begin(self) -> None:
        """What grew is queued again: the server that grew it is gone. Deadlines of another start of
        the machine are renewed: how long it was off, nobody knows."""
        run = self.connection.execute
        for (seq,) in run(f"SELECT seq FROM trees WHERE state = '{State.GROWING}'").fetchall():
            self.move(seq, State.QUEUED)
        known = run("SELECT value FROM facts WHERE name = 'boot'").fetchone()
        if known and known[0] == self._boot():
            return
        now = self.now()
        run(f"UPDATE trees SET lease_until = ? + lease_s WHERE state = '{State.LEASED}'", (now,))
        run(
            f"UPDATE trees SET not_before = 0, submitted_at = ? WHERE state = '{State.QUEUED}'",
            (now,),
        )
        run("INSERT OR REPLACE INTO facts VALUES ('boot', ?)", (self._boot(),))

    def value(self, query: str, *arguments: Any) -> Any:
        """The first column of the first row, or None."""
        row = self.connection.execute(query, arguments).fetchone()
        return None if row is None else row[0]

    def move(self, seq: int, state: State, **columns: Any) -> None:
        """The one statement that changes a tree's state; other columns change with it. Raises
        LookupError for a way that the states do not have."""
        before = self.value("SELECT state FROM trees WHERE seq = ?", seq)
        if before is None or state not in WAYS[State(before)]:
            raise LookupError(f"a tree cannot become {state}: it is {before or 'gone'}")
        changes = "".join(f", {name} = ?" for name in columns)
        self.connection.execute(
            f"UPDATE trees SET state = ?{changes} WHERE seq = ?", (state, *columns.values(), seq)
        )

    def note(self, seq: int, reason: str) -> None:
        """Adds to a tree's reasons; of many the newest stay."""
        before = json.loads(self.value("SELECT reasons FROM trees WHERE seq = ?", seq))
        newest = [*before, reason[:_MOST_REASON_CHARACTERS]][-_MOST_REASONS:]
        self.connection.execute(
            "UPDATE trees SET reasons = ? WHERE seq = ?", (json.dumps(newest), seq)
        )

    def drop_bytes(self, seqs: Sequence[int], *, prompts: bool = False) -> None:
        """Drops trees' bytes, and their prompts if nobody will grow them again."""
        each = [(seq,) for seq in seqs]
        self.connection.executemany("DELETE FROM parts WHERE seq = ?", each)
        self.connection.executemany("UPDATE trees SET tree_bytes = 0 WHERE seq = ?", each)
        if prompts:
            self.connection.executemany("DELETE FROM prompts WHERE seq = ?", each)

    def shrink(self) -> None:
        """Gives some of the file's free pages back to the disk, if it has many."""
        if self.value("PRAGMA freelist_count") > _SLACK_PAGES:
            for _ in range(_VACUUM_PAGES):  # Python's sqlite3 does one page of a call's
                self.connection.execute("PRAGMA incremental_vacuum(1)")
            self._reserve.take()
