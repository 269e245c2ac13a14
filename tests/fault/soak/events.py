"""What happened in a run, as JSON lines: a file for each process, merged by time.

Times are of CLOCK_MONOTONIC, which all processes of a machine share and no fault moves. [s]
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any


class Kind(StrEnum):
    """Kinds of events, with their facts. `asked_s`: when the call began whose answer it is."""

    SUBMITTED = "submitted"
    """id, poison (its own fault kills it): the server took the prompt."""
    CANCELLED = "cancelled"
    """id: somebody asked the server to forget the prompt."""
    LEASED = "leased"
    """id, lease, lease_s, asked_s, paths (the weight versions along each path, from the root)."""
    TRAINED = "trained"
    """id: stands in the run's durable ledger."""
    ACKED = "acked"
    """id, lease: the server confirmed it."""
    RETURNED = "returned"
    """id, lease, reason: the learner is giving it back."""
    GONE = "gone"
    """id, lease: the server does not know the lease any more."""
    SENT = "sent"
    """version, digest: a push began."""
    REFUSED = "refused"
    """version, digest, code: the server said that it did not take the push."""
    ROLLBACK = "rollback"
    """A rollback was asked for."""
    SERVED = "served"
    """version, digest, asked_s: the server said that it serves this version."""
    FAULT = "fault"
    """name, trees (how many are in each state), version (state of the newest weight version)."""
    HEALED = "healed"
    """name, recovery_s: trees come again."""
    STARTED = "started"
    """The server serves."""
    DIED = "died"
    """status: the server ended, however."""
    ENDED = "ended"
    """id, state, reasons: a row of the journal at the end of the run."""


@dataclass(frozen=True)
class Event:
    """One line."""

    at_s: float
    kind: Kind
    facts: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.facts[name]


def now_s() -> float:
    """The clock of the events."""
    return time.monotonic()


class EventLog:
    """Appends to one file; what a killed writer left half-written is cut off first."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab+")
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)

    def write(self, kind: Kind, *, durably: bool = False, **facts: Any) -> None:
        """One line, on the disk when this returns if `durably`."""
        line = json.dumps({"at_s": now_s(), "kind": kind, **facts})
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        if durably:
            os.fsync(self._file.fileno())


def read_events(paths: Iterable[Path]) -> list[Event]:
    """The whole lines of these files, in order of time."""
    events = []
    for path in paths:
        for line in path.read_bytes().split(b"\n")[:-1]:
            facts = json.loads(line)
            events.append(Event(facts.pop("at_s"), Kind(facts.pop("kind")), facts))
    return sorted(events, key=lambda event: event.at_s)
