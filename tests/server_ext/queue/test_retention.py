"""What is kept of trees that nobody waits for: bounded, and what is counted stays counted."""

from __future__ import annotations

from server_ext.queue.retention import Retention
from server_ext.queue.states import State
from tests.server_ext.queue.book import MANY


def test_the_oldest_acked_trees_are_forgotten_and_still_counted(book):
    book.reopen(retention=Retention(acked=3))
    leases = book.leased(*map(str, range(8)))
    for lease_id in leases:
        book.journal.ack([lease_id])
    assert list(book.rows()) == ["5", "6", "7"]
    assert book.journal.counts()[State.ACKED] == 8
    book.journal.ack(leases[-3:])  # again: a no-op
    assert book.journal.submit([("7", b"prompt 7"), ("0", b"prompt 0")]) == (1, 1)
    assert [queued.id for queued in book.journal.take(9)] == ["0"]


def test_a_smaller_bound_holds_from_the_next_start_on(book):
    book.journal.ack(book.leased(*map(str, range(8))))
    assert len(book.rows()) == 8
    book.reopen(retention=Retention(acked=2))
    assert list(book.rows()) == ["6", "7"]


def test_of_dead_trees_the_newest_bytes_are_kept_and_all_prompts(book):
    book.reopen(retention=Retention(dead_bytes=2500))
    book.graded("a", "b", "c", "d", "e", size=1000)
    leases = [lease.lease_id for lease in book.journal.lease(9, 9.0, MANY)]
    for lease_id in leases:
        book.journal.bury([lease_id], "no use")
    found = book.rows("state, prompt IS NOT NULL, tree IS NOT NULL, tree_bytes")
    assert [found[id_] for id_ in "abc"] == [("dead", 1, 0, 0)] * 3
    assert [found[id_] for id_ in "de"] == [("dead", 1, 1, 1000)] * 2


def test_the_file_does_not_grow_with_what_goes_through(book):
    """Five times as many trees in a file of the same size; a large backlog's room comes back."""
    book.reopen(retention=Retention(acked=50))

    def through(low: int, high: int) -> int:
        for n in range(low, high, 100):
            book.journal.ack(book.leased(*map(str, range(n, n + 100))))
        return book.path.stat().st_size

    first = through(0, 100)
    assert through(100, 500) < 1.2 * first
    book.graded(*(f"big {n}" for n in range(40)), size=1024**2)
    book.journal.database.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    full = book.path.stat().st_size
    assert full > 40 * 1024**2
    for _ in range(40):
        (lease,) = book.journal.lease(1, 9.0, MANY)
        book.journal.ack([lease.lease_id])
    book.journal.database.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert book.path.stat().st_size < 0.6 * full
