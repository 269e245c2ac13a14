"""Calls that wait together are one transaction, and each still fails by itself."""

from __future__ import annotations

import asyncio
import threading

import pytest

from server_ext.errors import ConflictError, DiskFullError, NotGrowingError, UnknownLeaseError
from server_ext.queue.journal import Journal
from server_ext.queue.journal_thread import JournalThread
from server_ext.queue.states import State
from tests.server_ext.queue.book import MANY


@pytest.fixture
def journal(tmp_path):
    thread = JournalThread(lambda: Journal(tmp_path / "journal.sqlite"))
    yield thread
    thread.close()


async def together(journal: JournalThread, *calls):
    """What the calls give that find the thread busy, and how many commits they needed."""
    busy, commits = threading.Event(), []
    waits = asyncio.ensure_future(journal(lambda _: busy.wait(10)))
    await asyncio.sleep(0.02)
    db = journal._journal.database.connection
    waiting = [asyncio.ensure_future(journal(*call)) for call in calls]
    await asyncio.sleep(0.02)
    db.set_trace_callback(lambda line: commits.append(line) if line == "COMMIT" else None)
    busy.set()
    await waits
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    db.set_trace_callback(None)
    return answers, len(commits)


async def test_one_commit_for_all_and_a_failure_for_its_own_call_alone(journal):
    await journal(Journal.submit, [("a", b"1"), ("b", b"2")])
    answers, commits = await together(
        journal,
        (Journal.submit, [("c", b"3"), ("a", b"1")]),
        (Journal.submit, [("d", b"4"), ("a", b"another")]),
        (Journal.take, 1),
        (Journal.store, "a", b"tree"),
        (Journal.store, "b", b"tree"),
        (Journal.lease, 1, 60.0, MANY),
        (Journal.ack, ["unknown"]),
        (Journal.counts,),
    )
    assert commits == 1
    submitted, clash, taken, stored, not_growing, leased, unknown, counts = answers
    assert submitted == (1, 1) and isinstance(clash, ConflictError)
    assert [queued.id for queued in taken] == ["a"] and stored is None
    assert isinstance(not_growing, NotGrowingError) and isinstance(unknown, UnknownLeaseError)
    assert [lease.id for lease in leased] == ["a"]
    assert counts == dict.fromkeys(State, 0) | {State.QUEUED: 2, State.LEASED: 1}
    assert await journal(Journal.counts) == counts


async def test_a_disk_without_room_for_all_takes_those_that_fit(journal):
    await journal(Journal.submit, [("a", b"1")])
    await journal(Journal.take, 1)
    await journal(Journal.store, "a", b"tree")

    def limit(journal: Journal) -> None:
        db = journal.database
        pages = db.value("PRAGMA page_count") + 40
        db.connection.execute(f"PRAGMA max_page_count = {pages}")

    await journal(limit)
    answers, _ = await together(
        journal,
        (Journal.submit, [("small", b"s")]),
        (Journal.submit, [("large", bytes(400_000))]),
        (Journal.lease, 1, 60.0, MANY),
        (Journal.submit, [("other", b"o")]),
    )
    assert answers[0] == answers[3] == (1, 0)
    assert isinstance(answers[1], DiskFullError)
    (lease,) = answers[2]
    assert lease.id == "a"  # leased once, although the calls were tried twice
    assert await journal(Journal.counts) == dict.fromkeys(State, 0) | {
        State.QUEUED: 2,
        State.LEASED: 1,
    }
    await journal(Journal.nack, [lease.lease_id], "it is held")


async def test_a_caller_that_left_changes_nothing_for_the_others(journal):
    busy = threading.Event()
    waits = asyncio.ensure_future(journal(lambda _: busy.wait(10)))
    await asyncio.sleep(0.02)
    left = asyncio.ensure_future(journal(Journal.submit, [("a", b"1")]))
    stays = asyncio.ensure_future(journal(Journal.counts))
    await asyncio.sleep(0.02)
    left.cancel()
    busy.set()
    await waits
    assert (await stays)[State.QUEUED] == 1  # what was asked for is done all the same
