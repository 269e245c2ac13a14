"""The states in a tree's life, and the ways between them.

    submit ─▶ queued ─▶ growing ─▶ graded ─▶ leased ─▶ acked
                ▲ ▲        │         ▲         │
                │ ├────────┤         └─────────┤  returned (lease ran out, handed back): not counted
                │ │        │                   │
                │ │        │  interrupted: engine, grader, disk or server was away; not counted,
                │ │        │               tried again after a growing pause (`not_before`)
                │ │        └  failed: the prompt's or the tree's own fault; counted
                │ │                            │
                │ └───────── dead ◀────────────┘  failed too often, handed back as bad too often,
              revived                             or unreadable

A prompt that is cancelled (queued, growing) and a tree that is purged (dead, graded, acked) are
forgotten: their ids may be submitted again.
"""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """States in a tree's life; drawn in the module's docstring."""

    QUEUED = "queued"
    GROWING = "growing"
    GRADED = "graded"
    LEASED = "leased"
    ACKED = "acked"
    DEAD = "dead"


WAYS = {
    State.QUEUED: {State.GROWING},
    State.GROWING: {State.QUEUED, State.GRADED, State.DEAD},
    State.GRADED: {State.LEASED},
    State.LEASED: {State.GRADED, State.ACKED, State.DEAD},
    State.ACKED: set[State](),
    State.DEAD: {State.QUEUED},
}
"""Where each state leads."""

CANCELLABLE = (State.QUEUED, State.GROWING)
PURGEABLE = (State.DEAD, State.GRADED, State.ACKED)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 300.0


def pause_s(interruptions: int) -> float:
    """How long a prompt rests after so many interruptions in a row: 1, 2, 4 … 300 seconds."""
    return float(min(_FIRST_PAUSE_S * 2.0 ** min(interruptions - 1, 30), _LONGEST_PAUSE_S))


def run_of(id_: str) -> str:
    """The run that a prompt belongs to: what stands in its id before the last "/"; else none."""
    return id_.rpartition("/")[0]
