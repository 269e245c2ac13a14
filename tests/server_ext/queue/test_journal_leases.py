"""Leases: order, limits, running out, extending, acking; all or nothing."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path

import pytest

from server_ext.errors import UnknownLeaseError
from server_ext.queue.schema import PART_BYTES
from server_ext.queue.states import State
from tests.server_ext.queue.book import MANY, Book


def trees(book: Book, count: int, max_bytes: int = MANY) -> list[str]:
    leased = book.journal.lease(count, 60.0, max_bytes)
    assert len({lease.lease_id for lease in leased}) == len(leased)
    return [lease.tree.decode().rstrip(".") for lease in leased]


def test_the_oldest_prompt_is_leased_first_whenever_it_was_graded(book):
    book.journal.submit([(i, b"") for i in "abcdef"])
    book.journal.take(6)
    for i in "ecafbd":
        book.journal.store(i, i.encode())
    assert trees(book, 2) == ["a", "b"]
    assert trees(book, 9) == ["c", "d", "e", "f"]
    assert trees(book, 9) == []


def test_a_tree_given_back_is_leased_before_younger_ones(book):
    leases = book.leased("a", "b", "c")
    book.journal.nack(leases[1:2], "no")
    book.graded("d")
    assert trees(book, 9) == ["b", "d"]


@pytest.mark.parametrize(("max_bytes", "leased"), [(10, 1), (19, 1), (20, 2), (29, 2), (30, 3)])
def test_the_byte_limit_holds(book, max_bytes, leased):
    book.graded("a", "b", "c", size=10)
    assert len(trees(book, 9, max_bytes)) == leased
    assert book.journal.counts()[State.GRADED] == 3 - leased


def test_a_tree_over_the_byte_limit_comes_without_its_bytes_and_is_read_in_parts(book):
    """Also one whose bytes end with a part, and from a place inside a part."""
    big = random.Random(0).randbytes(2 * PART_BYTES)
    book.graded("a", size=2)
    book.journal.submit([("big", b"")])
    book.journal.take(1)
    book.journal.store("big", big)
    book.graded("c", size=2)
    first, second, third = book.journal.lease(9, 60.0, 100)
    assert (first.tree, third.tree) == (b"a.", b"c.")
    assert (second.id, second.tree, second.tree_bytes) == ("big", None, len(big))
    parts, at = [], 0
    while part := book.journal.read(second.lease_id, at):
        parts.append(part)
        at += len(part)
    assert b"".join(parts) == big and max(map(len, parts)) == PART_BYTES
    assert book.journal.read(second.lease_id, PART_BYTES - 3) == big[PART_BYTES - 3 : PART_BYTES]
    assert book.journal.read(second.lease_id, 5 * PART_BYTES) == b""
    book.journal.ack([second.lease_id])
    with pytest.raises(UnknownLeaseError):
        book.journal.read(second.lease_id, 0)


def test_leasing_large_trees_reads_their_sizes_alone(book):
    """By what SQLite fetches from the file: 24 MiB lie there."""
    for id_ in "abc":
        book.graded(id_, size=8 * 1024**2)
    db = book.reopen().database.connection
    db.execute("PRAGMA cache_size = 16")
    read = Path("/proc/self/io")
    before = int(read.read_text().split()[1])
    assert [lease.tree for lease in book.journal.lease(3, 60.0, 100)] == [None] * 3
    assert int(read.read_text().split()[1]) - before < 1024**2


def test_a_run_leases_its_own_trees_alone(book):
    book.graded("one/1", "two/1", "one/2", "plain", "one/deep/1", "oneish/1")
    leases = {run: book.journal.lease(9, 60.0, MANY, run) for run in ("one", "one/deep", "")}
    assert [[lease.id for lease in found] for found in leases.values()] == [
        ["one/1", "one/2"],
        ["one/deep/1"],
        ["plain"],
    ]
    assert [lease.id for lease in book.journal.lease(9, 60.0, MANY)] == ["two/1", "oneish/1"]
    assert book.journal.counts("one") == dict.fromkeys(State, 0) | {State.LEASED: 2}


def test_a_lease_holds_until_it_runs_out_by_the_clock(book):
    (lease_id,) = book.leased("a", lease_s=10.0)
    book.now += 9.9
    assert trees(book, 1) == []
    book.now += 0.2
    with pytest.raises(UnknownLeaseError):
        book.journal.ack([lease_id])
    (again,) = book.journal.lease(1, 10.0, MANY)
    assert (again.tree, again.returns) == (b"a...", 1)
    assert again.lease_id != lease_id
    with pytest.raises(UnknownLeaseError):
        book.journal.extend([lease_id], 10.0)
    book.journal.ack([again.lease_id])


def test_extending_counts_from_now(book):
    short, long = book.leased("a", "b", lease_s=10.0)
    book.now += 9.0
    book.journal.extend([short], 5.0)
    book.journal.extend([long], 100.0)
    book.journal.extend([], 1.0)
    book.now += 4.9
    assert book.journal.counts()[State.LEASED] == 2
    book.now += 0.2
    assert book.rows() == {"a": "leased", "b": "leased"}
    assert book.journal.expire() == 1
    assert book.rows() == {"a": "graded", "b": "leased"}
    book.journal.extend([long], 1.0)  # it may end a lease sooner
    book.now += 1.1
    assert book.journal.expire() == 1


def test_acking_twice_is_a_no_op(book):
    first, second = book.leased("a", "b")
    book.journal.ack([first])
    with book.unchanged():
        book.journal.ack([first])
        book.journal.ack([first, first])
        book.journal.ack([])
    book.now += 10**6  # also long after it would have run out, and after re-opening
    book.reopen()
    book.journal.ack([first])
    assert book.journal.counts()[State.ACKED] == 1
    with pytest.raises(UnknownLeaseError):
        book.journal.ack([second])


NOT_HELD = ["absent", "empty", "ran out", "nacked", "acked", "tree's id"]
CALLS = {"extend": [99.0], "ack": [], "nack": ["why"], "bury": ["why"]}


@pytest.mark.parametrize("good_first", [True, False])
@pytest.mark.parametrize(
    ("call", "bad"), [pair for pair in product(CALLS, NOT_HELD) if pair != ("ack", "acked")]
)
def test_a_lease_that_is_not_held_changes_nothing(book, call, bad, good_first):
    gone, nacked, acked = book.leased("gone", "nacked", "acked", lease_s=10.0)
    book.journal.nack([nacked], "no")
    book.journal.ack([acked])
    book.now += 10.1
    book.journal.expire()
    book.graded("good")
    leases = {lease.tree: lease.lease_id for lease in book.journal.lease(9, 60.0, MANY)}
    good = leases[b"good"]  # "gone" is held too, by another lease
    names = {"ran out": gone, "nacked": nacked, "acked": acked, "tree's id": "good", "empty": ""}
    name = names.get(bad, "0" * 32)
    lease_ids = [good, name] if good_first else [name, good]
    with book.unchanged(), pytest.raises(UnknownLeaseError, match=name or "''"):
        getattr(book.journal, call)(lease_ids, *CALLS[call])
    book.journal.ack(list(leases.values()))


def test_a_lease_that_ran_out_unseen_is_not_held(book):
    first, second = book.leased("a", "b", lease_s=10.0)
    book.journal.extend([second], 100.0)
    book.now += 10.1
    for call in (lambda ids: book.journal.extend(ids, 9.0), book.journal.ack):
        with pytest.raises(UnknownLeaseError, match=first):
            call([second, first])
    assert book.journal.counts() == dict.fromkeys(State, 0) | {State.GRADED: 1, State.LEASED: 1}
    assert book.rows("returns") == {"a": 1, "b": 0}


def test_a_tree_stays_dead(book):
    (lease_id,) = book.leased("a")
    for _ in range(2):
        book.journal.nack([lease_id], "no", bad=True)
        lease_id = book.journal.lease(1, 9.0, MANY)[0].lease_id
    book.journal.nack([lease_id], "no", bad=True)
    assert book.rows() == {"a": "dead"}
    book.now += 10**6
    book.reopen()
    assert book.journal.lease(9, 9.0, MANY) == book.journal.take(9) == []
    assert book.rows("state, tree") == {"a": ("dead", b"a...")}
