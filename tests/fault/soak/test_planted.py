"""Bugs planted in the real queue are found by the checker, and without them it finds nothing.

The queue, producer, services and gRPC are the server's own (tests/server_ext/site.py), the learner
is a process that can be killed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from processes import Process

from server_ext.queue.journal import Journal
from server_ext.rewards.remote import RemoteGrader
from tests.fault.soak.events import EventLog, Kind, read_events
from tests.fault.soak.history import Verdict, check
from tests.fault.soak.servers import ToyServer, module
from tests.fault.soak.toy_server import BUGS
from tests.fault.soak.trainer import DRAIN, ledger_path
from tests.server_ext.fakes import until
from tests.server_ext.queue.book import rows
from tests.server_ext.site import Site

RUN = "a"
LEASE_S = 1.0
WAIT_S = 120.0
MAX_FAILURES = 3
"""As in tests/server_ext/site.py."""


@pytest.fixture(params=["sound", "bug"])
def planted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Plants the bug of this name, half of the times; says whether."""

    def plant(name: str) -> bool:
        if request.param == "sound":
            return False
        for method in ("__init__", "lease", "ack", "interrupt"):
            if hasattr(Journal, method):  # so that all of it is undone
                monkeypatch.setattr(Journal, method, getattr(Journal, method))
        BUGS[name]()
        return True

    return plant


def most_reasons(journal: Path) -> int:
    """Of the prompt that went wrong most often: how often."""
    return max((len(json.loads(told)) for told in rows(journal, "reasons").values()), default=0)


class Play:
    """A run that is followed through its events."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        self.data.mkdir()
        self._files = [ledger_path(folder, RUN), folder / "ends.jsonl"]

    @asynccontextmanager
    async def served(self, data: Path, rewards: str = "") -> AsyncIterator[Site]:
        """`rewards`: address of the reward service that grades; empty: the server does."""
        grader = RemoteGrader(rewards, 0.2) if rewards else None
        graders = {"exact": grader} if grader else {}
        async with Site(data, graders=graders, max_open_trees=1) as site:
            yield site
        if grader:
            await grader.close()

    @contextmanager
    def learner(self, site: Site, train_s: float = 0.05) -> Iterator[Process]:
        times = map(str, (train_s, LEASE_S))
        process = Process(
            module("trainer", site.target, RUN, str(self.folder), *times),
            self.folder / "learner.log",
        )
        try:
            yield process
        finally:
            process.kill()

    def count(self, kind: Kind) -> int:
        events = read_events(path for path in self._files if path.exists())
        return sum(event.kind is kind for event in events)

    async def comes(self, kind: Kind, more_than: int = 0) -> None:
        await until(lambda: self.count(kind) > more_than, WAIT_S)

    def verdict(self) -> Verdict:
        """On what has happened so far."""
        return check(read_events(path for path in self._files if path.exists()))

    async def drained(self, data: Path, hopeless: str = "") -> Verdict:
        """The learner trains on what is left; nothing is hoped of trees in the state `hopeless`."""
        (self.folder / DRAIN).touch()
        path = ToyServer().journal(data)
        left = {"queued", "growing", "graded", "leased"} - {hopeless}
        await until(lambda: not left & set(rows(path).values()), WAIT_S)
        log = EventLog(self._files[1])
        for id_, state in rows(path).items():
            log.write(Kind.ENDED, id=id_, state=state, reasons=[])
        return self.verdict()


async def test_a_lease_that_acks_itself_loses_what_a_killed_learner_held(
    tmp_path: Path, planted: Callable[[str], bool]
) -> None:
    bug, play = planted("lease_acks_itself"), Play(tmp_path)
    async with play.served(play.data) as site:
        with play.learner(site, train_s=WAIT_S):
            await play.comes(Kind.LEASED)
        with play.learner(site):
            verdict = await play.drained(play.data)
    assert bool(verdict.lost) == bug
    assert verdict.clean != bug


async def test_an_ack_that_is_forgotten_has_trees_trained_on_twice(
    tmp_path: Path, planted: Callable[[str], bool]
) -> None:
    bug, play = planted("ack_is_forgotten"), Play(tmp_path)
    async with play.served(play.data) as site:
        with play.learner(site):
            await play.comes(Kind.ACKED)
            if bug:
                await until(lambda: play.verdict().doubled, WAIT_S)
            else:
                assert (await play.drained(play.data)).clean


async def test_a_restart_that_forgets_growing_trees_loses_them(
    tmp_path: Path, planted: Callable[[str], bool]
) -> None:
    bug, play = planted("restart_forgets_growing"), Play(tmp_path)
    after = tmp_path / "after"
    async with play.served(play.data) as site:
        site.engine.go_on.clear()  # rollouts hang
        with play.learner(site):
            await play.comes(Kind.SUBMITTED, more_than=2)
            path = ToyServer().journal(play.data)
            await until(lambda: "growing" in rows(path).values(), WAIT_S)
        shutil.copytree(play.data, after)  # the disk as a power failure leaves it
    async with play.served(after) as site:
        with play.learner(site):
            verdict = await play.drained(after, hopeless="growing" if bug else "")
    assert bool(verdict.lost) == bug
    assert verdict.clean != bug


async def test_an_outage_that_counts_against_prompts_kills_them(
    tmp_path: Path, planted: Callable[[str], bool]
) -> None:
    bug, play = planted("interruption_counts"), Play(tmp_path)
    nobody = "127.0.0.1:1"
    async with play.served(play.data, rewards=nobody) as site:
        with play.learner(site):
            await play.comes(Kind.SUBMITTED, more_than=2)
            path = ToyServer().journal(play.data)
            await until(lambda: most_reasons(path) >= MAX_FAILURES, WAIT_S)
    async with play.served(play.data) as site:  # the grader is back
        with play.learner(site):
            verdict = await play.drained(play.data)
    assert bool(verdict.wrongly_dead) == bug
    assert verdict.clean != bug
