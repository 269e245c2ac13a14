"""Which faults met which states of trees and of weight versions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random


class Fault(StrEnum):
    """What the nemesis does."""

    SERVER_KILLED = "server killed"
    SERVER_STOPPED = "server stopped"
    SERVER_TERMINATED = "server told to end"
    SCHEDULER_STOPPED = "SGLang's scheduler stopped"
    ENGINE_KILLED = "SGLang's scheduler killed"
    CONNECTIONS_RESET = "connections reset"
    CONNECTIONS_HALF_OPEN = "connections half-open"
    LATENCY = "latency"
    DISK_FULL = "disk full"
    CLOCK_STEP = "clock step"
    GRADER_KILLED = "reward service killed"
    GRADER_STOPPED = "reward service stopped"
    LEARNER_KILLED = "learner killed"
    PUSH_CUT = "push cut"
    ROLLBACK_CUT = "rollback cut"


TREE_STATES = ("queued", "growing", "graded", "leased", "acked")
VERSION_STATES = (
    "announced", "received", "verified", "staged", "applied", "serving", "rejected"
)  # fmt: skip

_OVER = "the call is over then: there is nothing to cut"
CANNOT_OCCUR: dict[tuple[Fault, str], str] = {
    (Fault.PUSH_CUT, "serving"): _OVER,
    (Fault.PUSH_CUT, "rejected"): _OVER,
    (Fault.ROLLBACK_CUT, "serving"): _OVER,
    (Fault.ROLLBACK_CUT, "rejected"): _OVER,
    (Fault.ROLLBACK_CUT, "received"): "a rollback receives nothing",
    (Fault.ROLLBACK_CUT, "verified"): "left at once: the files of a rollback are staged already",
}
"""Cells that no run can hit, and why."""

Cell = tuple[Fault, str]


def cells(faults: Iterable[Fault]) -> list[Cell]:
    """Cells that can occur: these faults × states of a tree and × states of a version."""
    return [
        (fault, state)
        for fault in faults
        for state in (*TREE_STATES, *VERSION_STATES)
        if (fault, state) not in CANNOT_OCCUR
    ]


@dataclass
class Coverage:
    """How often each cell was hit. `faults`: those that this machine allows."""

    faults: tuple[Fault, ...]
    hits: dict[Cell, int] = field(default_factory=dict)

    def note(self, fault: Fault, trees: dict[str, int], version: str) -> None:
        """A fault was injected while there were so many trees in each state, and the newest version
        was in this one."""
        present = [state for state in TREE_STATES if trees.get(state)]
        for state in (*present, version):
            if (fault, state) in cells(self.faults):
                self.hits[fault, state] = self.hits.get((fault, state), 0) + 1

    def missing(self) -> list[Cell]:
        """Cells that can occur and were not hit."""
        return [cell for cell in cells(self.faults) if cell not in self.hits]

    @property
    def share(self) -> float:
        """Share of the cells that can occur which were hit, in [0, 1]."""
        total = len(cells(self.faults))
        return (total - len(self.missing())) / total if total else 0.0

    def rows(self) -> list[list[str]]:
        """A row a fault, a column a state: hits, 0 for a cell that was missed, – for one that
        cannot occur."""
        return [
            [
                fault,
                *(
                    "–" if (fault, state) in CANNOT_OCCUR else str(self.hits.get((fault, state), 0))
                    for state in (*TREE_STATES, *VERSION_STATES)
                ),
            ]
            for fault in self.faults
        ]


Strike = tuple[Fault, str]
"""A fault, and the state of a weight version in which it comes."""


def strikes(rng: Random, coverage: Coverage) -> Iterator[Strike]:
    """Every fault in every state of a version, in random order; then what was missed; for ever."""
    pairs = [(fault, state) for fault, state in cells(coverage.faults) if state in VERSION_STATES]
    order = pairs
    while True:
        yield from rng.sample(order, len(order))
        order = [cell for cell in coverage.missing() if cell in pairs] or pairs
