"""What an operator does with trees: list, revive, purge, cancel."""

from __future__ import annotations

import pytest

from server_ext.errors import NotGrowingError
from server_ext.queue.inspection import Chosen, cancel, listed, purge, revive
from server_ext.queue.states import State
from tests.server_ext.queue.book import MANY


@pytest.fixture
def mixed(book):
    """A tree in each state in each of two runs."""
    for run in ("one", "two"):
        book.journal.submit([(f"{run}/{n}", b"p") for n in range(6)])
        taken = [queued.id for queued in book.journal.take(5)]
        assert taken == [f"{run}/{n}" for n in range(5)]
        for id_ in taken[1:]:
            book.journal.store(id_, b"tree of " + id_.encode(), 3)
        leases = [lease.lease_id for lease in book.journal.lease(3, 60.0, MANY, run)]
        book.journal.ack(leases[:1])
        book.journal.bury(leases[1:2], "no use")
        book.journal.take(1, {"one", "two"})
        for id_ in (f"{run}/5",):  # back to the queue, resting
            book.journal.take(1)
            book.journal.interrupt(id_, "away")
    return book


STATES = ["growing", "acked", "dead", "leased", "graded", "queued"]


def test_trees_are_listed_in_order_by_state_and_run(mixed):
    everything = listed(mixed.journal, None, None, 0, 99)
    assert [(entry.id, entry.state) for entry in everything] == [
        (f"{run}/{n}", state) for run in ("one", "two") for n, state in enumerate(STATES)
    ]
    assert [entry.number for entry in everything] == list(range(1, 13))
    some = listed(mixed.journal, None, "two", everything[7].number, 2)
    assert [entry.id for entry in some] == ["two/2", "two/3"]
    (dead,) = listed(mixed.journal, State.DEAD, "two", 0, 9)
    assert dead.reasons == ("no use",) and dead.tree_bytes == len("tree of two/2")
    growing, _, _, leased, graded, queued = everything[:6]
    assert (growing.version, graded.version) == (None, 3)
    assert leased.lease_left_s == 60.0 and graded.lease_left_s is None
    assert (queued.rests_s, queued.interruptions, graded.rests_s) == (1.0, 1, None)


def test_a_dead_id_is_grown_again_with_nothing_counted_against_it(mixed):
    dead = Chosen(["one/2", "one/3", "unknown"])
    assert revive(mixed.journal, dead) == 1
    assert revive(mixed.journal, dead) == 0
    columns = "state, failures, returns, refusals, tree_bytes, tree"
    assert mixed.rows(columns)["one/2"] == ("queued", 0, 0, 0, 0, None)
    assert mixed.journal.reasons("one/2") == ["no use"]
    (queued,) = mixed.journal.take(9)
    assert (queued.id, queued.prompt) == ("one/2", b"p")
    for _ in range(2):
        assert mixed.journal.fail("one/2", "its own") is State.QUEUED
        mixed.journal.take(1)
    assert mixed.journal.fail("one/2", "its own") is State.DEAD


@pytest.mark.parametrize(
    ("chosen", "gone"),
    [
        (Chosen(["one/2", "two/1", "one/2"]), ["one/2"]),
        (Chosen(run="two"), ["two/2"]),
        (Chosen(), ["one/2", "two/2"]),
        (Chosen(run="o"), []),
    ],
)
def test_purging_forgets_the_chosen_dead_and_nothing_else(mixed, chosen, gone):
    before = set(mixed.rows())
    assert purge(mixed.journal, chosen, State.DEAD) == len(gone)
    assert before - set(mixed.rows()) == set(gone)
    for id_ in gone:
        assert mixed.journal.submit([(id_, b"another prompt")]) == (1, 0)


@pytest.mark.parametrize("state", [State.GRADED, State.ACKED])
def test_other_ends_can_be_purged_too(mixed, state):
    assert purge(mixed.journal, Chosen(run="one"), state) == 1
    assert f"one/{STATES.index(state)}" not in mixed.rows()
    db = mixed.journal.database
    orphans = "SELECT COUNT(*) FROM {} WHERE seq NOT IN (SELECT seq FROM trees)"
    assert db.value(orphans.format("parts")) == db.value(orphans.format("prompts")) == 0
    counts = mixed.journal.counts()
    assert counts[State.GRADED] == (1 if state is State.GRADED else 2)
    assert counts[State.ACKED] == 2  # all that ever were


def test_cancelled_prompts_are_forgotten_and_who_grows_one_is_told(mixed):
    assert cancel(mixed.journal, Chosen(run="one")) == 2
    assert {"one/0", "one/5"}.isdisjoint(mixed.rows())
    with pytest.raises(NotGrowingError):
        mixed.journal.store("one/0", b"tree")
    mixed.journal.requeue("one/0")
    assert cancel(mixed.journal, Chosen()) == 2
    assert mixed.journal.counts()[State.QUEUED] == mixed.journal.counts()[State.GROWING] == 0
    assert mixed.journal.submit([("one/0", b"another")]) == (1, 0)
