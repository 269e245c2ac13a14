"""Whose fault it was: interrupted growths rest and never die, failed ones are counted."""

from __future__ import annotations

import pytest

from server_ext.errors import NotGrowingError
from server_ext.queue.states import State
from tests.server_ext.queue.book import MANY


def taken(book) -> list[str]:
    return [queued.id for queued in book.journal.take(9)]


def test_an_interrupted_prompt_rests_longer_each_time_and_never_dies(book):
    book.journal.submit([("a", b"")])
    rests = []
    for _ in range(12):
        assert taken(book) == ["a"]
        rests.append(book.journal.interrupt("a", "the engine is away"))
        book.now += rests[-1] - 0.01
        assert taken(book) == []
        assert book.journal.rest_s() == pytest.approx(0.01, abs=1e-6)
        book.now += 0.02
    assert rests == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]
    assert book.rows("state, failures, interruptions") == {"a": ("queued", 0, 12)}
    assert book.journal.rest_s() is None
    assert set(book.journal.reasons("a")) == {"the engine is away"}


def test_rests_begin_anew_after_a_growth_that_ended(book):
    book.journal.submit([("a", b"")])
    for ends in (lambda: book.journal.fail("a", "its own"), lambda: None):
        for expected in (1.0, 2.0):
            book.now += 9
            assert taken(book) == ["a"]
            assert book.journal.interrupt("a", "away") == expected
        book.now += 9
        assert taken(book) == ["a"]
        ends()


def test_others_are_taken_while_one_rests(book):
    book.journal.submit([("a", b""), ("b", b"")])
    assert book.journal.take(1)[0].id == "a"
    book.journal.interrupt("a", "away")
    assert taken(book) == ["b"]
    book.now += 1.1
    assert taken(book) == ["a"]


def test_a_rest_is_over_where_nobody_knows_how_long_the_machine_was_off(book):
    book.journal.submit([("a", b"")])
    for _ in range(10):
        taken(book)
        book.journal.interrupt("a", "away")
        book.now += 400
    taken(book)
    book.journal.interrupt("a", "away")
    book.reopen()  # the same start of the machine: it still rests
    assert taken(book) == []
    book.boot, book.now = "the next start", 3.0
    book.reopen()
    assert taken(book) == ["a"]


def test_only_own_faults_lead_to_death(book):
    book.journal.submit([("a", b"")])
    states = []
    for _ in range(3):
        for _ in range(5):
            book.now += 1000
            taken(book)
            book.journal.interrupt("a", "away")
        book.now += 1000
        taken(book)
        states.append(book.journal.fail("a", "its own"))
    assert states == [State.QUEUED, State.QUEUED, State.DEAD]


@pytest.mark.parametrize("call", ["store", "fail", "interrupt"])
@pytest.mark.parametrize("state", ["queued", "graded", "leased", "gone"])
def test_what_does_not_grow_does_not_end_growing(book, call, state):
    if state in ("graded", "leased"):
        book.graded("a")
    elif state == "queued":
        book.journal.submit([("a", b"")])
    if state == "leased":
        book.journal.lease(1, 9.0, MANY)
    extra = b"tree" if call == "store" else "why"
    with book.unchanged(), pytest.raises(NotGrowingError, match="'a'"):
        getattr(book.journal, call)("a", extra)


def test_a_run_that_is_held_is_passed_over(book):
    book.journal.submit([("one/1", b""), ("two/1", b""), ("one/2", b""), ("plain", b"")])
    assert [q.id for q in book.journal.take(9, {"one", ""})] == ["two/1"]
    assert [q.id for q in book.journal.take(9, {"none"})] == ["one/1", "one/2", "plain"]


def test_backlogs_are_told_by_run(book):
    for n, version in enumerate([7, 4, 9]):
        book.journal.submit([(f"one/{n}", b"")])
        taken(book)
        book.journal.store(f"one/{n}", b"tree", version)
    book.graded("two/0")
    backlogs = book.journal.backlogs()
    assert {run: (b.graded, b.oldest_version) for run, b in backlogs.items()} == {
        "one": (3, 4),
        "two": (1, None),
    }
    book.journal.lease(2, 9.0, MANY, "one")
    assert book.journal.backlogs()["one"].oldest_version == 9
