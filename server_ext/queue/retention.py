"""What the journal keeps of trees that nobody waits for any more."""

from __future__ import annotations

from dataclasses import dataclass

from server_ext.queue.database import Database
from server_ext.queue.states import State

_MOST_AT_ONCE = 10_000
"""Rows forgotten in one transaction: others wait for it."""


@dataclass(frozen=True)
class Retention:
    """`acked`: trees whose ids are remembered after their ack, so that submitting or acking them
    again changes nothing; `dead_bytes`: of dead trees, the newest first. A dead prompt stays until
    it is purged: it can be grown again."""

    acked: int = 100_000
    dead_bytes: int = 1024**3

    def of_acked(self, database: Database) -> None:
        """Forgets the oldest acked trees beyond `acked`."""
        kept = database.value(f"SELECT n FROM counts WHERE state = '{State.ACKED}'")
        if kept > self.acked:
            database.connection.execute(
                "DELETE FROM trees WHERE seq IN (SELECT seq FROM trees"
                f" WHERE state = '{State.ACKED}' ORDER BY seq LIMIT ?)",
                (min(kept - self.acked, _MOST_AT_ONCE),),
            )

    def of_dead(self, database: Database) -> None:
        """Drops the bytes of the oldest dead trees beyond `dead_bytes`."""
        rows = database.connection.execute(
            f"SELECT seq, tree_bytes FROM trees WHERE state = '{State.DEAD}' AND tree_bytes > 0"
            " ORDER BY seq DESC"
        ).fetchall()
        kept, dropped = 0, []
        for seq, size in rows:
            kept += size
            if kept > self.dead_bytes:
                dropped.append(seq)
        database.drop_bytes(dropped)
