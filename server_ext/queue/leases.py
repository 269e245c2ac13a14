"""The half of the journal that leases trees: order, running out, giving back, acking."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from server_ext.errors import DiskFullError, UnknownLeaseError
from server_ext.queue.database import Database
from server_ext.queue.retention import Retention
from server_ext.queue.schema import PART_BYTES
from server_ext.queue.states import State

P = ParamSpec("P")
T = TypeVar("T")
L = TypeVar("L", bound="Leases")


def on_the_reserve(
    method: Callable[Concatenate[L, P], T],
) -> Callable[Concatenate[L, P], T]:
    """What must go on when the disk is full: with the room that is kept for it."""

    @wraps(method)
    def call(self: L, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(self, *args, **kwargs)
        except DiskFullError:
            if self.is_together or not self.database.give_reserve():
                raise
        return method(self, *args, **kwargs)

    return call


@dataclass(frozen=True)
class Leased:
    """A scored tree handed out; `tree` is None for one of more bytes than were asked for at once:
    `Journal.read` has them."""

    lease_id: str
    id: str
    tree: bytes | None
    tree_bytes: int
    returns: int


class Leases:
    """Trees that are handed out. Every method is one transaction; besides what they say, all raise
    DiskFullError, JournalAwayError and JournalDamagedError, with nothing changed."""

    def __init__(self, database: Database, retention: Retention, max_returns: int) -> None:
        """`max_returns`: times a tree may be handed back as bad."""
        self.database, self._retention, self._max_returns = database, retention, max_returns
        self._run, self._value = database.connection.execute, database.value
        self.is_together = False
        """Whether several calls are one transaction now."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is called inside is one transaction on disk: all of it is there afterwards, or
        nothing if this raises."""
        self.is_together = True
        try:
            with self.database.transaction():
                yield
        finally:
            self.is_together = False

    def check_together(self) -> None:
        """Raises DiskFullError if SQLite has undone what was called inside `together` so far."""
        if not self.database.connection.in_transaction:
            raise DiskFullError("the disk is full; what was called together is undone")

    @on_the_reserve
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

    @on_the_reserve
    def extend(self, lease_ids: Sequence[str], lease_s: float) -> None:
        """Prolongs leases. Raises UnknownLeaseError, with none prolonged, if one is not held."""
        with self.database.transaction():
            until = self.database.now() + lease_s
            for seq in self._held(lease_ids, State.LEASED):
                query = "UPDATE trees SET lease_s = ?, lease_until = ? WHERE seq = ?"
                self._run(query, (lease_s, until, seq))

    @on_the_reserve
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

    @on_the_reserve
    def nack(self, lease_ids: Sequence[str], reason: str, *, bad: bool = False) -> None:
        """Gives trees back; `bad` says that they themselves are at fault, which counts. Raises
        UnknownLeaseError, with none given back."""
        with self.database.transaction():
            for seq in self._held(lease_ids, State.LEASED):
                self._give_back(seq, reason or "nacked without a reason", bad=bad)
            if bad:
                self._retention.of_dead(self.database)

    @on_the_reserve
    def bury(self, lease_ids: Sequence[str], reason: str) -> None:
        """Makes trees of no use to anyone dead at once, whatever was counted. Raises
        UnknownLeaseError, with none buried."""
        with self.database.transaction():
            for seq in self._held(lease_ids, State.LEASED):
                self.database.note(seq, reason)
                self.database.move(seq, State.DEAD, lease_id=None, lease_until=None)
            self._retention.of_dead(self.database)

    @on_the_reserve
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

    def _state(self, seq: int) -> State:
        return State(self._value("SELECT state FROM trees WHERE seq = ?", seq))

    def _bytes(self, seq: int) -> bytes:
        query = "SELECT data FROM parts WHERE seq = ? ORDER BY part"
        return b"".join(data for (data,) in self._run(query, (seq,)))
