"""The durable journal of prompts, scored trees and leases (SQLite); states.py draws a tree's life.

`growing` falls back to `queued` when the journal is opened: the server that grew it is gone.
Prompts and trees are opaque bytes here. Times are those of clock.py: a step of the wall clock
changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from server_ext.errors import ConflictError, DiskFullError, NotGrowingError, QueueFullError
from server_ext.queue import clock
from server_ext.queue.database import Database
from server_ext.queue.leases import Leases, on_the_reserve
from server_ext.queue.retention import Retention
from server_ext.queue.schema import write_parts
from server_ext.queue.states import State, pause_s, run_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Queued:
    """A prompt to grow; `waited_s` since it was submitted, or since the machine was started."""

    id: str
    prompt: bytes
    waited_s: float


@dataclass(frozen=True)
class Backlog:
    """What waits to be leased of one run: trees, and the oldest weights in them."""

    graded: int
    oldest_version: int | None


class Journal(Leases):
    """Prompts, trees and leases, for one thread. Every method is one transaction, durable unless
    it says otherwise.

    Besides what they say, all raise DiskFullError, JournalAwayError and JournalDamagedError, with
    nothing changed.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_returns: int = 5,
        max_failures: int = 3,
        retention: Retention | None = None,
        clock: Callable[[], float] = clock.now_s,
        boot: Callable[[], str] = clock.boot,
    ) -> None:
        """`max_returns`: times a tree may be handed back as bad; `max_failures`: failed growths
        after which a prompt is dead. Raises FieldError for a file or volume that cannot be used."""
        super().__init__(Database(path, clock, boot), retention or Retention(), max_returns)
        self._max_failures = max_failures
        try:
            self._tidy()
        except DiskFullError as error:
            _log.warning("%s", error)

    def close(self) -> None:
        self.database.close()

    def _tidy(self) -> None:
        with self.database.transaction():
            self._retention.of_acked(self.database)
            self._retention.of_dead(self.database)

    def submit(
        self, prompts: Iterable[tuple[str, bytes]], most_queued: int = 2**62
    ) -> tuple[int, int]:
        """Queues (id, prompt) pairs; returns how many are new and how many were known.

        Raises, with nothing queued, ConflictError for an id known with other content and
        QueueFullError if more than `most_queued` would be queued.
        """
        new = known = 0
        with self.database.transaction():
            queued = self._count(State.QUEUED)
            now = self.database.now()
            for id_, prompt in prompts:
                content = hashlib.sha256(prompt).digest()
                before = self._value("SELECT content FROM trees WHERE id = ?", id_)
                if before is None:
                    cursor = self._run(
                        "INSERT INTO trees (id, run, content, state, submitted_at)"
                        " VALUES (?, ?, ?, ?, ?)",
                        (id_, run_of(id_), content, State.QUEUED, now),
                    )
                    self._run("INSERT INTO prompts VALUES (?, ?)", (cursor.lastrowid, prompt))
                    new += 1
                elif before == content:
                    known += 1
                else:
                    raise ConflictError(f"prompt id {id_!r} is known with other content")
            if new and queued + new > most_queued:
                raise QueueFullError(queued, new, most_queued)
        return new, known

    def take(self, count: int, held_runs: Collection[str] = ()) -> list[Queued]:
        """The oldest queued prompts that need not rest, now growing; none of `held_runs`. Not
        durable: what grows when the machine stops is queued again anyway."""
        marks = ", ".join("?" * len(held_runs))
        with self.database.transaction(synced=False):
            now = self.database.now()
            rows = self._run(
                f"SELECT seq FROM trees WHERE state = '{State.QUEUED}' AND not_before <= ?"
                f" AND run NOT IN ({marks}) ORDER BY seq LIMIT ?",
                (now, *held_runs, count),
            ).fetchall()
            taken = []
            for (seq,) in rows:
                self.database.move(seq, State.GROWING)
                query = (
                    "SELECT id, prompt, submitted_at FROM trees JOIN prompts USING (seq)"
                    " WHERE seq = ?"
                )
                id_, prompt, submitted_at = self._run(query, (seq,)).fetchone()
                taken.append(Queued(id_, prompt, max(now - submitted_at, 0.0)))
        return taken

    def rest_s(self) -> float | None:
        """Seconds until the next prompt has rested; None: none rests."""
        with self.database.transaction(synced=False):
            until = self._value(
                "SELECT MIN(not_before) FROM trees"
                f" WHERE state = '{State.QUEUED}' AND not_before > 0 AND not_before > ?",
                self.database.now(),
            )
            return None if until is None else max(until - self.database.now(), 0.0)

    def backlogs(self) -> dict[str, Backlog]:
        """What waits to be leased, by run."""
        with self.database.transaction(synced=False):
            rows = self._run(
                f"SELECT run, COUNT(*), MIN(version) FROM trees INDEXED BY graded_version"
                f" WHERE state = '{State.GRADED}' GROUP BY run"
            ).fetchall()
        return {run: Backlog(graded, version) for run, graded, version in rows}

    def store(self, id_: str, tree: bytes, version: int | None = None) -> None:
        """Stores a grown, graded tree, ready to be leased; `version` of the oldest weights in it.
        Raises NotGrowingError."""
        with self.database.transaction():
            seq = self._growing(id_)
            write_parts(self.database.connection, seq, tree)
            self.database.move(
                seq, State.GRADED, tree_bytes=len(tree), version=version, interruptions=0
            )

    def fail(self, id_: str, reason: str) -> State:
        """Growing failed by the prompt's or the tree's own fault: queued again, or dead after too
        many failures. Raises NotGrowingError."""
        with self.database.transaction():
            seq = self._growing(id_)
            self.database.note(seq, reason)
            failures = self._value("SELECT failures FROM trees WHERE seq = ?", seq) + 1
            state = State.DEAD if failures >= self._max_failures else State.QUEUED
            self.database.move(seq, state, failures=failures, interruptions=0)
            if state is State.DEAD:
                self._retention.of_dead(self.database)
        return state

    def interrupt(self, id_: str, reason: str) -> float:
        """Growing ended because something else was away: queued again, after a pause that grows
        from time to time; returns it [s]. Raises NotGrowingError."""
        with self.database.transaction():
            seq = self._growing(id_)
            self.database.note(seq, reason)
            times = self._value("SELECT interruptions FROM trees WHERE seq = ?", seq) + 1
            rest = pause_s(times)
            until = self.database.now() + rest
            self.database.move(seq, State.QUEUED, interruptions=times, not_before=until)
        return rest

    def requeue(self, id_: str) -> None:
        """Queues a prompt again whose growing was stopped; a no-op for one that does not grow."""
        with self.database.transaction(synced=False):
            row = self._run("SELECT seq, state FROM trees WHERE id = ?", (id_,)).fetchone()
            if row and row[1] == State.GROWING:
                self.database.move(row[0], State.QUEUED)

    def _growing(self, id_: str) -> int:
        row = self._run("SELECT seq, state FROM trees WHERE id = ?", (id_,)).fetchone()
        if row is None or row[1] != State.GROWING:
            state = "unknown" if row is None else row[1]
            raise NotGrowingError(f"tree {id_!r} is not growing: {state}")
        return int(row[0])

    @on_the_reserve
    def counts(self, run: str | None = None) -> dict[State, int]:
        """Trees by state, all or of one run; `acked` counts all that ever were, of one run those
        that are remembered."""
        with self.database.transaction(synced=False):
            self._expire()
            if run is None:
                found = dict(self._run("SELECT state, n FROM counts"))
                found[State.ACKED] = found["ever acked"]
            else:
                query = "SELECT state, COUNT(*) FROM trees WHERE run = ? GROUP BY state"
                found = dict(self._run(query, (run,)))
        return {state: found.get(state, 0) for state in State}

    def reasons(self, id_: str) -> list[str]:
        """Why a tree failed, was interrupted or given back, oldest first; the newest 8."""
        found = self._value("SELECT reasons FROM trees WHERE id = ?", id_)
        return [] if found is None else list(json.loads(found))

    def _count(self, state: State) -> int:
        return int(self._value("SELECT n FROM counts WHERE state = ?", state))
