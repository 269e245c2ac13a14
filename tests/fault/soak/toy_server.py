"""`python -m tests.fault.soak.toy_server FOLDER PORT REWARDS SWITCH [BUG]`: the server's own queue,
trees, weights and services on an engine without a model (tests/server_ext/site.py), until SIGTERM.

A BUG is planted in the real code, for the checker to find.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from functools import wraps
from pathlib import Path
from typing import Any

from server_ext.queue.journal import Journal
from server_ext.rewards.remote import RemoteGrader
from tests.fault.soak.servers import OPEN_TREES, REWARD_TIMEOUT_S
from tests.server_ext.queue.book import rows
from tests.server_ext.site import Site


def lease_acks_itself() -> None:
    """A tree that was handed out counts as done."""
    lease: Callable[..., Any] = Journal.lease

    @wraps(lease)
    def leased(self: Journal, *args: Any, **kwargs: Any) -> Any:
        result = lease(self, *args, **kwargs)
        self.ack([one.lease_id for one in result])
        return result

    Journal.lease = leased  # type: ignore[method-assign]


def interruption_counts() -> None:
    """Whatever ends a growth counts against the prompt."""
    if hasattr(Journal, "interrupt"):  # else it is so anyway

        def interrupt(self: Journal, id_: str, reason: str) -> float:
            self.fail(id_, reason)
            return 0.0

        Journal.interrupt = interrupt


def restart_forgets_growing() -> None:
    """What grew when the server died is never taken up again."""
    begin: Callable[..., None] = Journal.__init__

    @wraps(begin)
    def opened(self: Journal, path: Path, **kwargs: Any) -> None:
        growing = (
            [i for i, state in rows(path).items() if state == "growing"] if path.exists() else []
        )
        begin(self, path, **kwargs)
        with closing(sqlite3.connect(path)) as db, db:
            db.executemany(
                "UPDATE trees SET state = 'growing' WHERE id = ?", [(i,) for i in growing]
            )

    Journal.__init__ = opened  # type: ignore[method-assign]


def ack_is_forgotten() -> None:
    """An acked tree's lease runs out like any other, and it is handed out again."""

    def ack(self: Journal, lease_ids: list[str]) -> None:
        pass

    Journal.ack = ack  # type: ignore[method-assign,assignment]


BUGS: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        lease_acks_itself, interruption_counts, restart_forgets_growing, ack_is_forgotten
    )
}  # fmt: skip


async def serve(folder: Path, port: int, rewards: str, weight_switch: str) -> None:
    grader = RemoteGrader(rewards, REWARD_TIMEOUT_S)
    site = Site(
        folder,
        switch=weight_switch,
        graders={"exact": grader},  # what prompts that name none get
        max_open_trees=OPEN_TREES,
    )
    site.port = port
    await site.updater.restore()
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    async with site:
        print(f"toy server: serving on {site.target} (health 0, web 0)", flush=True)
        ended = asyncio.ensure_future(stopping.wait())
        await asyncio.wait({ended, site.producing}, return_when=asyncio.FIRST_COMPLETED)
        if site.producing.done():
            site.producing.result()  # the journal's disk was full
    await grader.close()


def main(folder: str, port: str, rewards: str, weight_switch: str, bug: str = "") -> None:
    logging.basicConfig(level=logging.INFO)
    if bug:
        BUGS[bug]()
    Path(folder).mkdir(parents=True, exist_ok=True)
    asyncio.run(serve(Path(folder), int(port), rewards, weight_switch))


if __name__ == "__main__":
    main(*sys.argv[1:])
