"""The breaker's life: closed, open, probing, and back."""

from __future__ import annotations

import logging

import pytest

from server_ext.queue.breaker import ENGINE, Breaker, Circuit, grader_name

REMOTE = grader_name("remote")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def breaker(clock):
    return Breaker(clock)


def opened(breaker: Breaker, what: str = REMOTE) -> None:
    for _ in range(3):
        breaker.failed(what, "UNAVAILABLE")


def test_single_errors_between_graded_trees_change_nothing(breaker):
    for _ in range(50):
        breaker.failed(REMOTE, "once")
        breaker.failed(REMOTE, "twice")
        breaker.graded("remote")
        assert breaker.state is Circuit.CLOSED and breaker.wait_s() == 0.0


def test_an_outage_opens_it_and_each_failed_try_makes_the_pause_longer(breaker, clock, caplog):
    opened(breaker)
    pauses = []
    for _ in range(9):
        assert breaker.state is Circuit.OPEN
        pauses.append(breaker.wait_s())
        clock.now += pauses[-1] - 0.5
        assert breaker.wait_s() == 0.5
        for _ in range(5):
            breaker.failed(REMOTE, "a tree that grew before")  # no try: the pause stays
        clock.now += 0.5
        assert breaker.wait_s() == 0.0
        breaker.taken()
        assert breaker.state is Circuit.PROBING and breaker.wait_s() is None
        breaker.failed(REMOTE, "still away")
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    clock.now += 60
    breaker.taken()
    breaker.graded("remote")
    assert breaker.state is Circuit.CLOSED and breaker.away == []
    lines = [record.getMessage() for record in caplog.records]
    assert "the grader 'remote' is away: no prompts are taken for 1 s" in lines[0]
    assert f"prompts are taken again, after {sum(pauses) + 60:.0f} s" in lines[-1]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_a_tree_of_another_grader_does_not_say_that_this_one_is_back(breaker, clock):
    opened(breaker)
    clock.now += 1
    breaker.taken()
    breaker.graded("exact")
    assert breaker.state is Circuit.OPEN and breaker.wait_s() == 0.0 and breaker.away == [REMOTE]
    breaker.taken()
    breaker.graded("remote")
    assert breaker.state is Circuit.CLOSED


def test_any_graded_tree_says_that_the_engine_is_back(breaker, clock):
    opened(breaker, ENGINE)
    clock.now += 1
    breaker.taken()
    breaker.graded("exact")
    assert breaker.state is Circuit.CLOSED


def test_a_try_that_says_nothing_is_followed_by_another(breaker, clock):
    opened(breaker)
    clock.now += 1
    for _ in range(3):
        breaker.taken()
        breaker.told_nothing()  # cancelled, or failed by its own fault
        assert breaker.state is Circuit.OPEN and breaker.wait_s() == 0.0
    breaker.told_nothing()
    assert breaker.state is Circuit.OPEN


def test_taking_and_ending_without_an_outage_leave_it_closed(breaker):
    breaker.taken()
    breaker.told_nothing()
    breaker.graded("math")
    assert breaker.state is Circuit.CLOSED
