"""What an operator does with the journal: look at trees, revive, purge and cancel them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ibtree.messages import TreeEntry
from server_ext.queue.journal import Journal
from server_ext.queue.states import CANCELLABLE, State

_COLUMNS = (
    *("seq", "id", "state", "failures", "interruptions", "returns", "refusals", "reasons"),
    *("tree_bytes", "submitted_at", "not_before", "lease_until", "version"),
)


@dataclass(frozen=True)
class Chosen:
    """Which trees are meant: these `ids`, else all of one `run`, else all."""

    ids: Sequence[str] = ()
    run: str | None = None


def listed(
    journal: Journal, state: State | None, run: str | None, after: int, count: int
) -> list[TreeEntry]:
    """At most `count` trees with a number above `after`, in the order of submission: a number is
    the place in it."""
    database = journal.database
    conditions: list[str] = ["seq > ?"]
    values: list[Any] = [after]
    if state is not None:
        conditions.append(f"state = '{state}'")  # no parameter: partial indexes are by state
    if run is not None:
        conditions.append("run = ?")
        values.append(run)
    with database.transaction(synced=False):
        now = database.now()
        rows = database.connection.execute(
            f"SELECT {', '.join(_COLUMNS)} FROM trees WHERE {' AND '.join(conditions)}"
            " ORDER BY seq LIMIT ?",
            (*values, count),
        ).fetchall()
    return [_entry(row, now) for row in rows]


def _entry(row: Sequence[Any], now: float) -> TreeEntry:
    found = dict(zip(_COLUMNS, row, strict=True))
    number, submitted_at = found.pop("seq"), found.pop("submitted_at")
    not_before, lease_until = found.pop("not_before"), found.pop("lease_until")
    rests = found["state"] == State.QUEUED and not_before > now
    leased = found["state"] == State.LEASED
    return TreeEntry(
        **(found | {"reasons": tuple(json.loads(found["reasons"]))}),
        number=number,
        age_s=max(now - submitted_at, 0.0),
        rests_s=not_before - now if rests else None,
        lease_left_s=max(lease_until - now, 0.0) if leased else None,
    )


def revive(journal: Journal, chosen: Chosen) -> int:
    """Dead prompts are queued again, with nothing counted against them; the reasons stay. Returns
    how many."""
    database = journal.database
    with database.transaction():
        seqs = _chosen(journal, chosen, (State.DEAD,))
        for seq in seqs:
            database.move(
                seq,
                State.QUEUED,
                failures=0,
                interruptions=0,
                returns=0,
                refusals=0,
                not_before=0,
                version=None,
            )
        database.drop_bytes(seqs)
    return len(seqs)


def purge(journal: Journal, chosen: Chosen, state: State) -> int:
    """Forgets trees in `state` (one of PURGEABLE), bytes and all; returns how many."""
    return _forget(journal, chosen, (state,))


def cancel(journal: Journal, chosen: Chosen) -> int:
    """Forgets prompts that are queued or growing; returns how many. Whoever grows one is told by
    NotGrowingError."""
    return _forget(journal, chosen, CANCELLABLE)


def _forget(journal: Journal, chosen: Chosen, states: Sequence[State]) -> int:
    database = journal.database
    with database.transaction():
        seqs = _chosen(journal, chosen, states)
        database.connection.executemany("DELETE FROM trees WHERE seq = ?", [(seq,) for seq in seqs])
        database.shrink()
    return len(seqs)


def _chosen(journal: Journal, chosen: Chosen, states: Sequence[State]) -> list[int]:
    """Of the chosen trees those in one of the states."""
    run = journal.database.connection.execute
    found = []
    for state in states:
        if chosen.ids:
            query = f"SELECT seq FROM trees WHERE id = ? AND state = '{state}'"
            found += [row for id_ in dict.fromkeys(chosen.ids) for row in run(query, (id_,))]
        elif chosen.run is not None:
            query = f"SELECT seq FROM trees WHERE run = ? AND state = '{state}'"
            found += run(query, (chosen.run,)).fetchall()
        else:
            found += run(f"SELECT seq FROM trees WHERE state = '{state}'").fetchall()
    return [seq for (seq,) in found]
