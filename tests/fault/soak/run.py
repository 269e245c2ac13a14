"""A soak from its first process to its verdict."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ibtree import AsyncClient
from ibtree.client import RpcFailed
from ibtree.messages import QueueStats
from tests.fault.soak.coverage import TREE_STATES, Coverage, Fault, Strike, strikes
from tests.fault.soak.events import Event, Kind, now_s, read_events
from tests.fault.soak.history import Verdict, check
from tests.fault.soak.nemesis import Nemesis
from tests.fault.soak.servers import Server
from tests.fault.soak.site import Site
from tests.fault.soak.versions import Publisher, Update
from tests.server_ext.queue.book import rows

SLOW_FSYNC_S = 0.4
"""So long the disk takes while a version has to be met in a state that is short otherwise."""
SLOW_STATES = {"received", "verified", "applied"}
"""States whose end waits for the disk."""
LOOK_S, CALL_S = 0.1, 5.0
FRESH_S = 1.0
"""The queue as it was so long ago counts as how it is."""
RECOVERY_S = 60.0
QUIET_S = 3.0
"""Nothing more comes when there was nothing for so long: a learner may be about to submit."""
CUTS = (Fault.PUSH_CUT, Fault.ROLLBACK_CUT)


@dataclass
class Report:
    """What a soak found."""

    verdict: Verdict
    coverage: Coverage
    faults: Counter[str]
    ended_by: dict[str, list[int]]
    """Exit statuses of servers that ended under a fault that need not end one."""
    recovery_s: list[float]
    """From the end of a fault until a learner trained on a further tree."""
    stalls: Counter[str]
    """Faults after which that took longer than RECOVERY_S."""
    prompts: Counter[str]
    """Prompts by what became of them."""


class Soak:
    """`await Soak(folder, seed, kind).run(…)` once."""

    def __init__(self, folder: Path, seed: int, kind: Server) -> None:
        self._rng = Random(seed)
        self._seed = seed
        self.site = Site(folder, kind)
        self._nemesis = Nemesis(self.site, self._rng)
        self._stats, self._looked_s = QueueStats(), 0.0
        self._told_state = "serving"
        """State of the newest weight version, as GetWeights said last."""
        self._recovery_s: list[float] = []
        self._stalls = Counter[str]()
        self._fault: Fault | None = None
        """The last one."""
        self._trained_trees, self._read_bytes = 0, Counter[Path]()
        """Seen in the learners' events so far, and how much of each file was read."""

    @property
    def faults(self) -> tuple[Fault, ...]:
        """Those that can be had here; once the site is up."""
        return tuple(fault for fault in Fault if fault not in self.site.faults_left_out)

    async def run(self, chosen: Iterable[Strike] | None, *, for_s: float, drain_s: float) -> Report:
        """Strikes until `for_s` is over, or `chosen` are through; then lets the learners train on
        what is left, for at most `drain_s`."""
        until_s = now_s() + for_s
        async with self.site as site:
            coverage = Coverage(self.faults)
            self._client = AsyncClient(site.address, timeout_s=CALL_S)
            self._publisher = Publisher(
                site.proxy.address,
                (await self._client.get_weights()).model_id,
                site.kind.model_file(site.data_dir),
                site.log,
                self._seed,
            )
            watching = asyncio.create_task(self._watch())
            try:
                await self._trained_more(0, RECOVERY_S)
                for fault, state in chosen or strikes(self._rng, coverage):
                    if now_s() > until_s:
                        break
                    if fault not in self.faults:
                        continue
                    await self._strike(fault, state, coverage)
                site.drain()
                await self._drained(drain_s)
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
                await self._client.close()
                await self._publisher.close()
        return self._report(coverage)

    def _report(self, coverage: Coverage) -> Report:
        events = read_events(self.site.event_files())
        return Report(
            check(events),
            coverage,
            Counter(e["name"] for e in events if e.kind is Kind.FAULT),
            self._nemesis.ended_by,
            self._recovery_s,
            self._stalls,
            _outcomes(events),
        )

    async def _strike(self, fault: Fault, state: str, coverage: Coverage) -> None:
        async with self._version_in(state, fault is Fault.ROLLBACK_CUT) as update:
            if fault in CUTS and (update is None or update.done):
                return  # it was over before it could be cut
            fresh = now_s() - self._looked_s < FRESH_S
            trees = self._stats if fresh else QueueStats()  # before: some faults take their time
            self._fault = fault
            async with self._nemesis.inject(fault, update):
                self._note(fault, trees, coverage)
                self.site.control.slow_fsync(0.0)
        self.site.check_learners()
        await self._recovered(fault)

    def _note(self, fault: Fault, trees: QueueStats, coverage: Coverage) -> None:
        """Writes down in which states the fault, which is there now, met trees and versions."""
        counts = {name: getattr(trees, name) for name in TREE_STATES}
        version = self.site.logged_state() or self._told_state
        self.site.log.write(Kind.FAULT, name=fault, trees=counts, version=version)
        coverage.note(fault, counts, version)

    @asynccontextmanager
    async def _version_in(self, state: str, by_rollback: bool) -> AsyncIterator[Update | None]:
        """Brings a weight version into this state, or tries to: a state may pass too quickly."""
        update = None
        version = (await self._served()) + 1
        if state in SLOW_STATES:
            self.site.control.slow_fsync(SLOW_FSYNC_S)
        if by_rollback:
            update = self._publisher.roll_back()
        elif state not in ("serving", "rejected") or state != self._told_state:
            update = self._publisher.push(
                version, held=state == "announced", damaged=state == "rejected"
            )
        try:
            if update and state in ("serving", "rejected"):
                await update.finish()
                await self._version_state()
            while update and not update.done and await self._version_state() != state:
                await asyncio.sleep(0.001)
            yield update
        finally:
            self.site.control.slow_fsync(0.0)
            if update:
                await update.finish()

    async def _served(self) -> int:
        """The served version, once the server tells it."""
        while True:
            try:
                return await self._look_at_weights()
            except RpcFailed:
                await self._nemesis.revive(self._fault)
                await asyncio.sleep(LOOK_S)

    async def _version_state(self) -> str:
        if logged := self.site.logged_state():
            return logged
        with suppress(RpcFailed):
            await self._look_at_weights()
        return self._told_state

    async def _look_at_weights(self) -> int:
        asked_s = now_s()
        served = await self._client.get_weights()
        self._told_state = served.state
        self._publisher.served(served.version, served.digest, asked_s)
        return served.version

    async def _watch(self) -> None:
        """Looks at the queue and at the weights all the time."""
        while True:
            with suppress(RpcFailed):
                self._stats, self._looked_s = await self._client.queue_stats(), now_s()
                await self._look_at_weights()
            await asyncio.sleep(LOOK_S)

    async def _recovered(self, fault: Fault) -> None:
        """Waits until a learner trained on a tree that came after the fault."""
        begin_s = now_s()
        if not await self._trained_more(self._count_trained(), RECOVERY_S):
            self._stalls[fault] += 1
        self._recovery_s.append(now_s() - begin_s)
        self.site.log.write(Kind.HEALED, name=fault, recovery_s=self._recovery_s[-1])

    async def _trained_more(self, than: int, timeout_s: float) -> bool:
        until_s = now_s() + timeout_s
        while self._count_trained() <= than:
            if now_s() > until_s:
                return False
            await self._nemesis.revive(self._fault)
            await asyncio.sleep(LOOK_S)
        return True

    def _count_trained(self) -> int:
        mark = f'"kind": "{Kind.TRAINED}"'.encode()
        for path in self.site.event_files():
            with path.open("rb") as file:
                file.seek(self._read_bytes[path])
                told, _, rest = file.read().rpartition(b"\n")
                self._read_bytes[path] = file.tell() - len(rest)
                self._trained_trees += told.count(mark)
        return self._trained_trees

    async def _drained(self, timeout_s: float) -> None:
        """Returns when nothing is left to train on, and writes down the journal's last words."""
        busy_s = now_s()
        until_s = busy_s + timeout_s
        while now_s() < min(until_s, busy_s + QUIET_S):
            await self._nemesis.revive(self._fault)
            await asyncio.sleep(LOOK_S)
            one = self._stats
            left = one.queued + one.growing + one.graded + one.leased
            if left or now_s() - self._looked_s > FRESH_S:
                busy_s = now_s()
        self.site.stop_learners()
        journal = self.site.kind.journal(self.site.data_dir)
        for id_, (state, reasons) in rows(journal, "state, reasons").items():
            self.site.log.write(Kind.ENDED, id=id_, state=state, reasons=_listed(reasons))


def _listed(reasons: str) -> list[str]:
    return [str(reason) for reason in json.loads(reasons)]


def _outcomes(events: list[Event]) -> Counter[str]:
    submitted = {e["id"] for e in events if e.kind is Kind.SUBMITTED}
    states = Counter(e["state"] for e in events if e.kind is Kind.ENDED)
    return Counter({"submitted": len(submitted), **states})


def quantile(values: list[float], share: float) -> float:
    """Of these values; 0 of none."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1]
