"""The wall clock is set back or forward, the server restarts, the machine restarts."""

from __future__ import annotations

import time

import pytest

from server_ext.errors import UnknownLeaseError
from server_ext.queue import clock
from server_ext.queue.journal import Journal
from server_ext.queue.states import State
from tests.server_ext.queue.book import MANY


@pytest.fixture
def real(tmp_path):
    """A journal on the machine's own clock."""
    journal = Journal(tmp_path / "journal.sqlite")
    yield journal
    journal.close()


@pytest.mark.parametrize("step_s", [-10 * 365 * 86400, -3600, 3600, 10 * 365 * 86400])
def test_a_step_of_the_wall_clock_changes_no_lease(real, tmp_path, monkeypatch, step_s):
    """Neither at once, nor after the server was started again."""
    real.submit([("a", b""), ("b", b""), ("rests", b"")])
    for queued in real.take(3):
        if queued.id == "rests":
            real.interrupt("rests", "away")
        else:
            real.store(queued.id, b"tree")
    (short,) = real.lease(1, 0.4, MANY)
    (long,) = real.lease(1, 60.0, MANY)
    wall = time.time
    monkeypatch.setattr(time, "time", lambda: wall() + step_s)
    assert real.counts()[State.LEASED] == 2
    assert real.take(1) == []
    again = Journal(tmp_path / "journal.sqlite")
    assert again.counts()[State.LEASED] == 2
    time.sleep(0.5)
    assert again.counts()[State.LEASED] == 1
    with pytest.raises(UnknownLeaseError):
        again.ack([short.lease_id])
    again.ack([long.lease_id])
    time.sleep(0.6)
    (rested,) = again.take(1)
    assert rested.id == "rests" and 1.0 < rested.waited_s < 30.0
    again.close()


def test_the_clock_is_the_machines(monkeypatch):
    assert clock.now_s() == pytest.approx(time.clock_gettime(time.CLOCK_BOOTTIME), abs=1.0)
    assert len(clock.boot()) == 36
    monkeypatch.setattr(clock, "_BOOT_ID", clock.Path("/nowhere"))
    assert clock.boot() == clock.boot() != ""


@pytest.mark.parametrize("now", [0.5, 1000.0, 10**9])
def test_when_the_machine_was_started_again_leases_have_their_whole_length(book, now):
    """However the new clock stands to the old one: none ends early, none is immortal."""
    (lease_id,) = book.leased("a", lease_s=10.0)
    book.now += 9.0
    book.boot, book.now = "the next start", now
    book.reopen()
    book.now += 9.9
    assert book.journal.counts()[State.LEASED] == 1
    book.reopen()  # of the server, not of the machine: nothing is renewed
    book.now += 0.2
    assert book.journal.counts()[State.LEASED] == 0
    with pytest.raises(UnknownLeaseError):
        book.journal.extend([lease_id], 1.0)


def test_a_wait_is_counted_from_the_start_of_the_machine(book):
    book.journal.submit([("a", b"")])
    book.boot, book.now = "the next start", 50.0
    book.reopen()
    book.now += 2.0
    assert book.journal.take(1)[0].waited_s == 2.0
