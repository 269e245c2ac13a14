"""The journal: every transition of the drawn life, leases, limits, re-opening."""

from __future__ import annotations

import pytest

from server_ext.errors import ConflictError, DiskFullError, UnknownLeaseError
from server_ext.queue.leases import Leased
from server_ext.queue.states import State
from tests.server_ext.queue.book import MANY


def test_the_drawn_life(book):
    journal = book.journal
    assert journal.counts() == dict.fromkeys(State, 0)
    assert journal.submit([("a", b"prompt")]) == (1, 0)
    assert book.rows() == {"a": "queued"}
    book.now += 5
    (queued,) = journal.take(3)
    assert (queued.id, queued.prompt, queued.waited_s) == ("a", b"prompt", 5.0)
    assert book.rows() == {"a": "growing"}
    journal.store("a", b"tree")
    assert book.rows() == {"a": "graded"}
    (leased,) = journal.lease(3, 60.0, MANY)
    assert leased == Leased(leased.lease_id, "a", b"tree", 4, 0)
    assert book.rows() == {"a": "leased"}
    journal.ack([leased.lease_id])
    assert book.rows("state, prompt, tree") == {"a": ("acked", None, None)}
    assert journal.counts() == dict.fromkeys(State, 0) | {State.ACKED: 1}
    assert journal.lease(1, 60.0, MANY) == []
    assert journal.take(1) == []


def test_interrupted_growth_is_queued_again_without_a_failure(book):
    book.journal.submit([("a", b"")])
    for _ in range(10):
        assert [queued.id for queued in book.journal.take(1)] == ["a"]
        book.journal.requeue("a")
    assert book.rows("state, failures") == {"a": ("queued", 0)}


def test_failures_queue_again_and_at_last_kill(book):
    book.journal.submit([("a", b"")])
    states = []
    for i in range(3):
        book.journal.take(1)
        states.append(book.journal.fail("a", f"because {i}"))
    assert states == [State.QUEUED, State.QUEUED, State.DEAD]
    assert book.rows() == {"a": "dead"}
    assert book.journal.reasons("a") == ["because 0", "because 1", "because 2"]
    assert book.journal.take(1) == book.journal.lease(1, 1.0, MANY) == []


def test_being_bad_gives_back_and_at_last_kills(book):
    (lease_id,) = book.leased("a")
    for returns in (1, 2):
        book.journal.nack([lease_id], f"reason {returns}", bad=True)
        assert book.rows() == {"a": "graded"}
        with pytest.raises(UnknownLeaseError):
            book.journal.ack([lease_id])
        (again,) = book.journal.lease(1, 60.0, MANY)
        assert (again.tree, again.returns) == (b"a...", returns)
        lease_id = again.lease_id
    book.journal.nack([lease_id], "", bad=True)
    assert book.rows("state, lease_id") == {"a": ("dead", None)}
    assert book.journal.reasons("a") == ["reason 1", "reason 2", "nacked without a reason"]
    assert book.journal.lease(1, 60.0, MANY) == []


def test_lost_leases_and_other_nacks_give_back_and_never_kill(book):
    """A learner that is restarted again and again holds the same trees each time."""
    book.leased("a", lease_s=10.0)
    book.now += 10.1
    assert book.journal.expire() == 1
    assert book.journal.expire() == 0
    for _ in range(20):
        (again,) = book.journal.lease(1, 10.0, MANY)
        book.journal.nack([again.lease_id], "the learner was restarted")
        (again,) = book.journal.lease(1, 10.0, MANY)
        book.now += 10.1
    assert again.returns == 40
    assert book.journal.counts()[State.DEAD] == 0
    assert book.rows("state, returns, refusals") == {"a": ("graded", 41, 0)}
    assert book.journal.reasons("a")[-2:] == ["the learner was restarted", "lease ran out"]
    assert len(book.journal.reasons("a")) == 8


def test_a_lease_named_twice_is_given_back_once(book):
    (lease_id,) = book.leased("a")
    book.journal.nack([lease_id, lease_id], "no")
    assert book.rows("state, returns") == {"a": ("graded", 1)}
    assert book.journal.reasons("a") == ["no"]


def test_submit_is_idempotent_in_every_state(book):
    assert book.journal.submit([("a", b"1"), ("b", b"2"), ("a", b"1")]) == (2, 1)
    for step in (
        lambda: book.journal.take(2),
        lambda: book.journal.store("a", b"tree"),
        lambda: [(book.journal.fail("b", "no"), book.journal.take(1)) for _ in range(3)],
        lambda: book.journal.ack([book.journal.lease(1, 9.0, MANY)[0].lease_id]),
        book.reopen,
    ):
        step()
        with book.unchanged():
            assert book.journal.submit([("b", b"2"), ("a", b"1")]) == (0, 2)
    assert book.rows() == {"a": "acked", "b": "dead"}


@pytest.mark.parametrize(
    "prompts",
    [
        [("new", b"3"), ("a", b"other"), ("newer", b"4")],
        [("new", b"3"), ("new", b"4")],
        [("new", b"3"), ("a", b"")],
    ],
)
def test_a_conflict_leaves_nothing_queued(book, prompts):
    book.journal.submit([("a", b"1")])
    clash = prompts[1][0]
    with book.unchanged(), pytest.raises(ConflictError, match=f"'{clash}'"):
        book.journal.submit(prompts)
    assert book.journal.submit([("new", b"3")]) == (1, 0)


def test_an_iterable_that_raises_leaves_nothing_queued(book):
    def prompts():
        yield "a", b"1"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        book.journal.submit(prompts())
    assert book.rows() == {}
    assert book.journal.submit([("a", b"1")]) == (1, 0)


def test_prompts_are_taken_oldest_first_and_once(book):
    ids = [f"{i}" for i in (5, 3, 9, 1, 7)]
    book.journal.submit([(i, b"") for i in ids])
    book.journal.submit([("late", b"")])
    assert [queued.id for queued in book.journal.take(2)] == ids[:2]
    assert [queued.id for queued in book.journal.take(99)] == [*ids[2:], "late"]
    book.journal.requeue("3")
    book.journal.submit([("later", b"")])
    assert [queued.id for queued in book.journal.take(99)] == ["3", "later"]


def test_odd_ids_and_bytes_survive(book):
    odd = ["", "é\n\0'\"; DROP TABLE trees", "x" * 256, "…"]
    blob = bytes(range(256))
    book.journal.submit([(i, blob) for i in odd])
    assert [(queued.id, queued.prompt) for queued in book.reopen().take(9)] == [
        (i, blob) for i in odd
    ]


def test_what_grew_is_queued_again_when_opened_and_the_rest_is_kept(book):
    leases = book.leased("leased", "acked", "back")
    book.journal.ack(leases[1:2])
    book.journal.nack(leases[2:], "no")
    book.graded("graded")
    book.journal.submit([("growing", b"p"), ("queued", b"q")])
    book.journal.take(1)
    before = book.rows("prompt, tree, returns, reasons, lease_id, lease_until")
    states = book.rows()
    book.now += 50
    book.reopen()
    assert book.rows() == states | {"growing": "queued"}
    assert book.rows("prompt, tree, returns, reasons, lease_id, lease_until") == before
    book.journal.extend(leases[:1], 60.0)  # still held
    book.now += 60.1
    book.reopen()
    assert book.rows()["leased"] == "leased"  # until someone looks
    assert book.journal.counts()[State.LEASED] == 0
    assert book.rows("state, returns")["leased"] == ("graded", 1)
    assert [queued.id for queued in book.journal.take(9)] == ["growing", "queued"]


def test_new_limits_hold_after_re_opening(book):
    book.leased("a")
    (lease_id,) = book.rows("lease_id").values()
    book.reopen(max_returns=0).nack([lease_id], "no", bad=True)
    assert book.rows() == {"a": "dead"}


def test_a_full_disk_changes_nothing_and_leaves_the_journal_usable(book):
    book.graded("a")
    db = book.journal.database.connection
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count = {pages}")
    with book.unchanged(), pytest.raises(DiskFullError, match="full"):
        book.journal.submit([(f"{i}", bytes(90_000)) for i in range(3)])
    db.execute("PRAGMA max_page_count = 100000")
    assert book.journal.submit([("b", b"")]) == (1, 0)
    assert book.rows() == {"a": "graded", "b": "queued"}
