"""How fast trees end: the hint when to come back."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from server_ext.capacity.pace import Pace


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def grown(pace: Pace, clock: Clock, trees: int, each_s: float, at_once: int = 1) -> None:
    """So many trees, each of which takes so long."""
    for _ in range(trees // at_once):
        with ExitStack() as stack:
            for _ in range(at_once):
                stack.enter_context(pace.growing())
            clock.now_s += each_s
            for _ in range(at_once):
                pace.ended()


def test_nothing_is_known_at_first():
    assert Pace(Clock()).expected_s(5) == 1.0


def test_trees_one_after_another():
    clock = Clock()
    pace = Pace(clock)
    grown(pace, clock, 30, 2.0)
    assert pace.expected_s(5) == pytest.approx(10.0, rel=0.05)
    assert (pace.expected_s(0), pace.expected_s(10**6)) == (0.1, 30.0)


def test_trees_at_once():
    clock = Clock()
    pace = Pace(clock)
    grown(pace, clock, 640, 16.0, at_once=64)
    assert pace.expected_s(4) == pytest.approx(1.0, rel=0.2)


def test_idle_nights_do_not_count():
    """One made the hint a minute for the next morning's callers, whose default time-out it is."""
    clock = Clock()
    pace = Pace(clock)
    grown(pace, clock, 30, 2.0)
    for _ in range(3):
        before = pace.expected_s(1)
        clock.now_s += 12 * 3600.0
        assert pace.expected_s(1) == before
        grown(pace, clock, 1, 2.0)
    assert pace.expected_s(1) == pytest.approx(2.0, rel=0.05)


def test_one_very_slow_tree_is_soon_forgotten():
    clock = Clock()
    pace = Pace(clock)
    grown(pace, clock, 1, 8 * 3600.0)
    assert pace.expected_s(1) == 30.0
    grown(pace, clock, 90, 2.0)
    assert pace.expected_s(1) == pytest.approx(2.0, rel=0.1)


def test_an_engine_that_gives_nothing_shows():
    """Nobody hopes on at the old pace while no tree ends."""
    clock = Clock()
    pace = Pace(clock)
    grown(pace, clock, 30, 2.0)
    with pace.growing():
        clock.now_s += 300.0
        assert pace.expected_s(1) == 30.0
