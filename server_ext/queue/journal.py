"""The durable journal of prompts, scored trees and leases (SQLite); states.py draws a tree's life.

`growing` falls back to `queued` when the journal is opened: the server that grew it is gone.
Prompts and trees are opaque bytes here. Times are those of clock.py: a step of the wall clock
changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from server_ext.errors import (
    ConflictError,
    DiskFullError,
    NotGrowingError,
    QueueFullError,
    UnknownLeaseError,
)
from server_ext.queue import clock
from server_ext.queue.database import Database
from server_ext.queue.retention import Retention
from server_ext.queue.schema import PART_BYTES, write_parts
from server_ext.queue.states import State, pause_s, run_of

_log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


def _on_the_reserve(
    method: Callable[Concatenate[Journal, P], T],
) -> Callable[Concatenate[Journal, P], T]:
    """What must go on when the disk is full: with the room that is kept for it."""

    @wraps(method)
    def call(self: Journal, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(self, *args, **kwargs)
        except DiskFullError:
            if self._is_together or not self.database.give_reserve():
                raise
        return method(self, *args, **kwargs)

    return call


@dataclass(frozen=True)
class Queued:
    """A prompt to grow; `waited_s` since it was submitted, or since the machine was started."""

    id: str
    prompt: bytes
    waited_s: float


@dataclass(frozen=True)
class Leased:
    """A scored tree handed out; `tree` is None for one of more bytes than were asked for at once:
    `Journal.read` has them."""

    lease_id: str
    id: str
    tree: bytes | None
    tree_bytes: int
    returns: int


@dataclass(frozen=True)
class Backlog:
    """What waits to be leased of one run: trees, and the oldest weights in them."""

    graded: int
    oldest_version: int | None


class Journal:
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
        self.database = Database(path, clock, boot)
        self._run, self._value = self.database.connection.execute, self.database.value
        self._max_returns, self._max_failures = max_returns, max_failures
        self._retention = retention or Retention()
        self._is_together = False
        try:
            self._tidy()
        except DiskFullError as error:
            _log.warning("%s", error)

    def close(self) -> None:
        self.database.close()

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is called inside is one transaction on disk: all of it is there afterwards, or
        nothing if this raises."""
        self._is_together = True
        try:
            with self.database.transaction():
                yield
        finally:
            self._is_together = False

    def check_together(self) -> None:
        """Raises DiskFullError if SQLite has undone what was called inside `together` so far."""
        if not self.database.connection.in_transaction:
            raise DiskFullError("the disk is full; what was called together is undone")

    def _tidy(self) -> None:
        with self.database.transaction():
            self._retention.of_acked(self.database)
            self._retention.of_dead(self.database)

    # ---- growth

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

    # ---- leases

    @_on_the_reserve
    def lease(
        self, count: int, lease_s: float, max_bytes: int, run: str | None = None
    ) -> list[Leased]:
        """Leases the oldest graded trees, all or of one run: at most `count`, and no more than
        `max_bytes` of them. A tree that alone has more comes without its bytes."""
        one_run = "" if run is None else "run = ? AND"
        leased: list[Leased] = []
        with self.database.transaction():
            self._expire()
            rows = self._run(
                f"SELECT seq, id, tree_bytes, returns FROM trees WHERE {one_run}"
                f" state = '{State.GRADED}' ORDER BY seq LIMIT ?",
                (*([] if run is None else [run]), count),
            ).fetchall()
            until, left = self.database.now() + lease_s, max_bytes
            for seq, id_, size, returns in rows:
                apart = size > max_bytes
                if not apart and size > left:
                    break
                tree = None if apart else self._bytes(seq)
                left -= 0 if apart else size
                lease_id = uuid.uuid4().hex
                self.database.move(
                    seq, State.LEASED, lease_id=lease_id, lease_s=lease_s, lease_until=until
                )
                leased.append(Leased(lease_id, id_, tree, size, returns))
        return leased

    def read(self, lease_id: str, start: int) -> bytes:
        """Some bytes of a leased tree from `start` on, at most a MiB; none at its end. Raises
        UnknownLeaseError."""
        with self.database.transaction(synced=False):
            (seq,) = self._held([lease_id], State.LEASED)
            query = "SELECT data FROM parts WHERE seq = ? AND part = ?"
            data = self._value(query, seq, start // PART_BYTES)
        return b"" if data is None else bytes(data[start % PART_BYTES :])

    @_on_the_reserve
    def extend(self, lease_ids: Sequence[str], lease_s: float) -> None:
        """Prolongs leases. Raises UnknownLeaseError, with none prolonged, if one is not held."""
        with self.database.transaction():
            until = self.database.now() + lease_s
            for seq in self._held(lease_ids, State.LEASED):
                query = "UPDATE trees SET lease_s = ?, lease_until = ? WHERE seq = ?"
                self._run(query, (lease_s, until, seq))

    @_on_the_reserve
    def ack(self, lease_ids: Sequence[str]) -> None:
        """Marks trees done; again is a no-op. Raises UnknownLeaseError, with none acked."""
        with self.database.transaction():
            done = self._held(lease_ids, State.LEASED, State.ACKED)
            leased = [seq for seq in done if self._state(seq) is State.LEASED]
            for seq in leased:
                self.database.move(seq, State.ACKED)
            self.database.drop_bytes(leased, prompts=True)
            self._retention.of_acked(self.database)
            self.database.shrink()

    @_on_the_reserve
    def nack(self, lease_ids: Sequence[str], reason: str, *, bad: bool = False) -> None:
        """Gives trees back; `bad` says that they themselves are at fault, which counts. Raises
        UnknownLeaseError, with none given back."""
        with self.database.transaction():
            for seq in self._held(lease_ids, State.LEASED):
                self._give_back(seq, reason or "nacked without a reason", bad=bad)
            if bad:
                self._retention.of_dead(self.database)

    @_on_the_reserve
    def bury(self, lease_ids: Sequence[str], reason: str) -> None:
        """Makes trees of no use to anyone dead at once, whatever was counted. Raises
        UnknownLeaseError, with none buried."""
        with self.database.transaction():
            for seq in self._held(lease_ids, State.LEASED):
                self.database.note(seq, reason)
                self.database.move(seq, State.DEAD, lease_id=None, lease_until=None)
            self._retention.of_dead(self.database)

    @_on_the_reserve
    def expire(self) -> int:
        """Gives back the trees whose lease ran out; returns how many."""
        with self.database.transaction():
            return self._expire()

    def _held(self, lease_ids: Sequence[str], *states: State) -> list[int]:
        self._expire()
        seqs = []
        for lease_id in dict.fromkeys(lease_ids):
            query = "SELECT seq, state FROM trees WHERE lease_id = ?"
            row = self._run(query, (lease_id,)).fetchone()
            if row is None or row[1] not in states:
                raise UnknownLeaseError(f"lease {lease_id!r} is unknown or ran out")
            seqs.append(int(row[0]))
        return seqs

    def _expire(self) -> int:
        rows = self._run(
            f"SELECT seq FROM trees WHERE state = '{State.LEASED}' AND lease_until < ?",
            (self.database.now(),),
        ).fetchall()
        for (seq,) in rows:
            self._give_back(seq, "lease ran out")
        return len(rows)

    def _give_back(self, seq: int, reason: str, *, bad: bool = False) -> None:
        self.database.note(seq, reason)
        query = "SELECT returns + 1, refusals + ? FROM trees WHERE seq = ?"
        returns, refusals = self._run(query, (bad, seq)).fetchone()
        self.database.move(
            seq,
            State.DEAD if bad and refusals > self._max_returns else State.GRADED,
            returns=returns,
            refusals=refusals,
            lease_id=None,
            lease_until=None,
        )

    # ---- what is there

    @_on_the_reserve
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

    def _state(self, seq: int) -> State:
        return State(self._value("SELECT state FROM trees WHERE seq = ?", seq))

    def _bytes(self, seq: int) -> bytes:
        query = "SELECT data FROM parts WHERE seq = ? ORDER BY part"
        return b"".join(data for (data,) in self._run(query, (seq,)))

    def _count(self, state: State) -> int:
        return int(self._value("SELECT n FROM counts WHERE state = ?", state))
