"""The table of faults × states counts what was hit, and only what can be."""

from __future__ import annotations

from itertools import islice
from random import Random

from tests.fault.soak.coverage import (
    TREE_STATES,
    VERSION_STATES,
    Coverage,
    Fault,
    cells,
    strikes,
)

FAULTS = (Fault.LATENCY, Fault.ROLLBACK_CUT)


def test_cells_that_cannot_occur_are_not_asked_for() -> None:
    states = {state for fault, state in cells(FAULTS) if fault is Fault.ROLLBACK_CUT}
    assert states == {*TREE_STATES, "announced", "staged", "applied"}


def test_what_was_hit_is_counted() -> None:
    coverage = Coverage(FAULTS)
    assert coverage.share == 0
    coverage.note(Fault.LATENCY, {"queued": 3, "growing": 0, "acked": 1}, "staged")
    assert set(coverage.hits) == {(Fault.LATENCY, s) for s in ("queued", "acked", "staged")}
    coverage.note(Fault.DISK_FULL, {"queued": 3}, "staged")  # cannot be had here
    coverage.note(Fault.ROLLBACK_CUT, {}, "received")  # cannot occur
    assert coverage.share == 3 / len(cells(FAULTS))
    for fault, state in coverage.missing():
        coverage.note(fault, {state: 1}, state if state in VERSION_STATES else "")
    assert coverage.share == 1 and not coverage.missing()
    assert coverage.rows()[0] == ["latency", "1", "1", "1", "1", "1", *["1"] * 7]
    assert coverage.rows()[1][-3:] == ["1", "–", "–"]


def test_strikes_go_through_all_and_then_after_what_was_missed() -> None:
    coverage = Coverage(FAULTS)
    order = strikes(Random(0), coverage)
    pairs = {cell for cell in cells(FAULTS) if cell[1] in VERSION_STATES}
    first = list(islice(order, len(pairs)))
    assert set(first) == pairs
    for fault, state in cells(FAULTS):
        if (fault, state) != (Fault.LATENCY, "staged"):
            coverage.note(fault, {state: 1}, state)
    assert list(islice(order, 2)) == [(Fault.LATENCY, "staged")] * 2
    assert list(islice(strikes(Random(0), Coverage(FAULTS)), len(pairs))) == first
