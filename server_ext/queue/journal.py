"""The durable journal of prompts, scored trees and leases (SQLite).

    submit ─▶ queued ─▶ growing ─▶ graded ─▶ leased ─▶ acked
                 ▲          │         ▲         │
                 └─ failed ─┤         └─ nacked or ran out
                            ▼                   ▼
                          dead  ◀── too many ───┘ or unreadable

`growing` falls back to `queued` when the journal is opened: the server that grew it is gone.
Prompts and trees are opaque bytes here. Times are Unix seconds, so that they survive a restart.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from server_ext.errors import ConflictError, QueueFullError, UnknownLeaseError


class State(StrEnum):
    """States in a tree's life; drawn in the module's docstring."""

    QUEUED = "queued"
    GROWING = "growing"
    GRADED = "graded"
    LEASED = "leased"
    ACKED = "acked"
    DEAD = "dead"


_SCHEMA = """
CREATE TABLE trees (
    seq          INTEGER PRIMARY KEY,
    id           TEXT NOT NULL UNIQUE,
    content      BLOB NOT NULL,              -- SHA-256 of the submitted prompt
    state        TEXT NOT NULL,
    prompt       BLOB,                       -- dropped when acked
    tree         BLOB,                       -- dropped when acked
    submitted_at REAL NOT NULL,
    failures     INTEGER NOT NULL DEFAULT 0,
    returns      INTEGER NOT NULL DEFAULT 0,
    reasons      TEXT NOT NULL DEFAULT '[]',
    lease_id     TEXT UNIQUE,                -- kept when acked: acking twice is a no-op
    lease_until  REAL
);
CREATE INDEX trees_by_state ON trees (state, seq);
PRAGMA user_version = 1;
"""


@dataclass(frozen=True)
class Queued:
    """A prompt to grow."""

    id: str
    prompt: bytes
    submitted_at: float


@dataclass(frozen=True)
class Leased:
    """A scored tree handed out."""

    lease_id: str
    tree: bytes
    returns: int


class Journal:
    """Prompts, trees and leases, for one thread. Every method is one durable transaction."""

    def __init__(
        self,
        path: Path,
        *,
        max_returns: int = 5,
        max_failures: int = 3,
        clock: Callable[[], float] = time.time,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        if self._db.execute("PRAGMA user_version").fetchone()[0] == 0:
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
        self._max_returns, self._max_failures, self._clock = max_returns, max_failures, clock
        with self._db:
            self._db.execute(
                "UPDATE trees SET state = ? WHERE state = ?", (State.QUEUED, State.GROWING)
            )

    def close(self) -> None:
        self._db.close()

    def submit(
        self, prompts: Iterable[tuple[str, bytes]], most_queued: int = 2**62
    ) -> tuple[int, int]:
        """Queues (id, prompt) pairs; returns how many are new and how many were known.

        Raises, with nothing queued, ConflictError for an id known with other content and
        QueueFullError if more than `most_queued` would be queued.
        """
        new = known = 0
        with self._transaction():
            query = "SELECT COUNT(*) FROM trees WHERE state = ?"
            (queued,) = self._db.execute(query, (State.QUEUED,)).fetchone()
            for id_, prompt in prompts:
                content = hashlib.sha256(prompt).digest()
                row = self._db.execute("SELECT content FROM trees WHERE id = ?", (id_,)).fetchone()
                if row is None:
                    self._db.execute(
                        "INSERT INTO trees (id, content, state, prompt, submitted_at)"
                        " VALUES (?, ?, ?, ?, ?)",
                        (id_, content, State.QUEUED, prompt, self._clock()),
                    )
                    new += 1
                elif row[0] == content:
                    known += 1
                else:
                    raise ConflictError(f"prompt id {id_!r} is known with other content")
            if new and queued + new > most_queued:
                raise QueueFullError(queued, new, most_queued)
        return new, known

    def take(self, count: int) -> list[Queued]:
        """The oldest queued prompts, now growing."""
        with self._transaction():
            rows = self._db.execute(
                "SELECT id, prompt, submitted_at FROM trees WHERE state = ? ORDER BY seq LIMIT ?",
                (State.QUEUED, count),
            ).fetchall()
            self._move([row[0] for row in rows], State.GROWING)
        return [Queued(*row) for row in rows]

    def store(self, id_: str, tree: bytes) -> None:
        """Stores a grown, graded tree, ready to be leased."""
        with self._transaction():
            self._growing(id_)
            self._db.execute("UPDATE trees SET tree = ? WHERE id = ?", (tree, id_))
            self._move([id_], State.GRADED)

    def fail(self, id_: str, reason: str) -> State:
        """Notes that growing failed: queued again, or dead after too many failures."""
        with self._transaction():
            self._growing(id_)
            self._note(id_, reason)
            self._db.execute("UPDATE trees SET failures = failures + 1 WHERE id = ?", (id_,))
            query = "SELECT failures FROM trees WHERE id = ?"
            failures = self._db.execute(query, (id_,)).fetchone()[0]
            state = State.DEAD if failures >= self._max_failures else State.QUEUED
            self._move([id_], state)
        return state

    def requeue(self, id_: str) -> None:
        """Queues a prompt again, whose growing ended by no fault of its own; a no-op for a tree
        just stored."""
        with self._transaction():
            if self._state(id_) is State.GROWING:
                self._move([id_], State.QUEUED)

    def lease(self, count: int, lease_s: float, max_bytes: int) -> list[Leased]:
        """Leases the oldest graded trees: at most `count` and, beyond the first, `max_bytes`."""
        leased: list[Leased] = []
        with self._transaction():
            self._expire()
            total = 0
            for id_, tree, returns in self._db.execute(
                "SELECT id, tree, returns FROM trees WHERE state = ? ORDER BY seq LIMIT ?",
                (State.GRADED, count),
            ).fetchall():
                total += len(tree)
                if leased and total > max_bytes:
                    break
                lease_id = uuid.uuid4().hex
                self._db.execute(
                    "UPDATE trees SET lease_id = ?, lease_until = ? WHERE id = ?",
                    (lease_id, self._clock() + lease_s, id_),
                )
                self._move([id_], State.LEASED)
                leased.append(Leased(lease_id, tree, returns))
        return leased

    def extend(self, lease_ids: Sequence[str], lease_s: float) -> None:
        """Prolongs leases. Raises UnknownLeaseError, with none prolonged, if one is not held."""
        with self._transaction():
            self._ids_of(lease_ids, State.LEASED)
            self._db.executemany(
                "UPDATE trees SET lease_until = ? WHERE lease_id = ?",
                [(self._clock() + lease_s, lease_id) for lease_id in lease_ids],
            )

    def ack(self, lease_ids: Sequence[str]) -> None:
        """Marks trees done; again is a no-op. Raises UnknownLeaseError, with none acked."""
        with self._transaction():
            ids = self._ids_of(lease_ids, State.LEASED, State.ACKED)
            self._move(ids, State.ACKED)
            self._db.executemany(
                "UPDATE trees SET prompt = NULL, tree = NULL WHERE id = ?", [(i,) for i in ids]
            )

    def nack(self, lease_ids: Sequence[str], reason: str) -> None:
        """Gives trees back. Raises UnknownLeaseError, with none given back."""
        with self._transaction():
            for id_ in self._ids_of(lease_ids, State.LEASED):
                self._give_back(id_, reason or "nacked without a reason")

    def bury(self, lease_ids: Sequence[str], reason: str) -> None:
        """Makes trees of no use to anyone dead at once, whatever their returns. Raises
        UnknownLeaseError, with none buried."""
        with self._transaction():
            for id_ in self._ids_of(lease_ids, State.LEASED):
                self._note(id_, reason)
                self._db.execute(
                    "UPDATE trees SET lease_id = NULL, lease_until = NULL WHERE id = ?", (id_,)
                )
                self._move([id_], State.DEAD)

    def expire(self) -> int:
        """Gives back the trees whose lease ran out; returns how many."""
        with self._transaction():
            return self._expire()

    def counts(self) -> dict[State, int]:
        """Trees by state."""
        with self._transaction():
            self._expire()
            rows = self._db.execute("SELECT state, COUNT(*) FROM trees GROUP BY state").fetchall()
        return {state: dict(rows).get(state, 0) for state in State}

    def reasons(self, id_: str) -> list[str]:
        """Why a tree failed or was given back, oldest first."""
        row = self._db.execute("SELECT reasons FROM trees WHERE id = ?", (id_,)).fetchone()
        return [] if row is None else list(json.loads(row[0]))

    def _state(self, id_: str) -> State | None:
        row = self._db.execute("SELECT state FROM trees WHERE id = ?", (id_,)).fetchone()
        return None if row is None else State(row[0])

    def _growing(self, id_: str) -> None:
        if self._state(id_) is not State.GROWING:
            raise LookupError(f"tree {id_!r} is not growing: {self._state(id_)}")

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)

    def _move(self, ids: Sequence[str], state: State) -> None:
        """The one statement that changes a tree's state."""
        self._db.executemany("UPDATE trees SET state = ? WHERE id = ?", [(state, i) for i in ids])

    def _ids_of(self, lease_ids: Sequence[str], *states: State) -> list[str]:
        self._expire()
        ids = []
        for lease_id in dict.fromkeys(lease_ids):
            query = "SELECT id, state FROM trees WHERE lease_id = ?"
            row = self._db.execute(query, (lease_id,)).fetchone()
            if row is None or row[1] not in states:
                raise UnknownLeaseError(f"lease {lease_id!r} is unknown or ran out")
            ids.append(row[0])
        return ids

    def _expire(self) -> int:
        rows = self._db.execute(
            "SELECT id FROM trees WHERE state = ? AND lease_until < ?",
            (State.LEASED, self._clock()),
        ).fetchall()
        for (id_,) in rows:
            self._give_back(id_, "lease ran out")
        return len(rows)

    def _give_back(self, id_: str, reason: str) -> None:
        self._note(id_, reason)
        self._db.execute(
            "UPDATE trees SET returns = returns + 1, lease_id = NULL, lease_until = NULL"
            " WHERE id = ?",
            (id_,),
        )
        returns = self._db.execute("SELECT returns FROM trees WHERE id = ?", (id_,)).fetchone()[0]
        self._move([id_], State.DEAD if returns > self._max_returns else State.GRADED)

    def _note(self, id_: str, reason: str) -> None:
        newest = [*self.reasons(id_), reason][-20:]
        self._db.execute("UPDATE trees SET reasons = ? WHERE id = ?", (json.dumps(newest), id_))


class _Transaction:
    """BEGIN IMMEDIATE … COMMIT, or ROLLBACK when something is raised inside."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        if not kind:
            self._db.execute("COMMIT")
        elif self._db.in_transaction:  # SQLite itself rolls back when the disk is full
            self._db.execute("ROLLBACK")
