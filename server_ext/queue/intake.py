"""May a prompt be taken now? Everything that holds up the queue, in one place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum

from server_ext.queue.breaker import Breaker, Circuit
from server_ext.queue.journal import Backlog, Journal
from server_ext.queue.journal_thread import JournalThread

_log = logging.getLogger(__name__)
_LOOK_AGAIN_S = 1.0


class Hold(StrEnum):
    """Why prompts are not taken."""

    AWAY = "away"
    """Engine or grader is away."""
    DISK = "disk"
    """Too little room on the journal's disk."""
    BACKLOG = "backlog"
    """Enough graded trees of a run wait to be leased."""
    WEIGHT_LAG = "weight_lag"
    """A graded tree of a run that waits was made by weights that are too old."""


@dataclass(frozen=True)
class Bounds:
    """When growing waits. `min_free_bytes` must be free on the journal's disk; at most `max_graded`
    trees of a run grow or wait to be leased; none that waits is more than `max_weight_lag` versions
    behind the served one. None: no bound."""

    min_free_bytes: int = 0
    max_graded: int | None = None
    max_weight_lag: int | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether prompts may be taken; not those of `held_runs`. If not, look again after `wait_s`, or
    when a tree has ended."""

    open: bool
    held_runs: frozenset[str] = frozenset()
    wait_s: float = 0.0


class Intake:
    """Looks at what holds up the queue. For one event loop."""

    def __init__(
        self,
        journal: JournalThread,
        bounds: Bounds | None = None,
        served_version: Callable[[], int] = lambda: 0,
        breaker: Breaker | None = None,
        told: Callable[[Collection[Hold]], None] = lambda _: None,
    ) -> None:
        """`served_version` of the weights; `told` hears of the holds whenever they change."""
        self._journal, self._bounds = journal, bounds or Bounds()
        self._served_version, self._told = served_version, told
        self.breaker = breaker or Breaker()
        self.unwritten = 0
        """Growths that have ended and wait for the disk to be written down."""
        self.holds: frozenset[Hold] = frozenset()

    async def look(self, growing: Mapping[str, int]) -> Verdict:
        """`growing`: trees that grow, by run. Raises what the journal raises."""
        holds: dict[Hold, str] = {}
        breaker_s = self.breaker.wait_s()
        if self.breaker.state is not Circuit.CLOSED:
            holds[Hold.AWAY] = " and ".join(self.breaker.away)
        if problem := await self._disk_problem():
            holds[Hold.DISK] = problem
        held: frozenset[str] = frozenset()
        if self._bounds.max_graded is not None or self._bounds.max_weight_lag is not None:
            backlogs = await self._journal(Journal.backlogs)
            held = self._held_runs(backlogs, growing, holds)
        self._tell(holds)
        is_open = breaker_s == 0.0 and Hold.DISK not in holds
        wait_s = _LOOK_AGAIN_S if breaker_s is None else max(breaker_s, _LOOK_AGAIN_S / 10)
        return Verdict(is_open, held, min(wait_s, _LOOK_AGAIN_S))

    async def _disk_problem(self) -> str:
        if self.unwritten:
            return f"{self.unwritten} growths cannot be written down"
        least = self._bounds.min_free_bytes
        if not least:
            return ""
        free = await self._journal(lambda journal: journal.database.free_bytes())
        return f"{free} bytes are free, --min-free-bytes is {least}" if free < least else ""

    def _held_runs(
        self, backlogs: Mapping[str, Backlog], growing: Mapping[str, int], holds: dict[Hold, str]
    ) -> frozenset[str]:
        most, most_lag = self._bounds.max_graded, self._bounds.max_weight_lag
        held = set()
        for run in {*backlogs, *growing} if most is not None else backlogs:
            backlog = backlogs.get(run, Backlog(0, None))
            if most is not None and backlog.graded + growing.get(run, 0) >= most:
                if backlog.graded >= most:
                    holds[Hold.BACKLOG] = f"{backlog.graded} graded trees of run {run!r} wait"
                held.add(run)
            oldest = backlog.oldest_version
            if most_lag is None or oldest is None:
                continue
            if (lag := self._served_version() - oldest) > most_lag:
                problem = f"a graded tree of run {run!r} is {lag} weight versions behind"
                holds[Hold.WEIGHT_LAG] = problem
                held.add(run)
        return frozenset(held)

    def _tell(self, holds: Mapping[Hold, str]) -> None:
        """A line for each hold that comes or goes; the breaker has its own."""
        for hold in sorted(holds.keys() - self.holds - {Hold.AWAY}):
            _log.warning("growing waits (%s): %s", hold, holds[hold])
        for hold in sorted(self.holds - holds.keys() - {Hold.AWAY}):
            _log.warning("growing goes on: no more %s", hold)
        if holds.keys() != self.holds:
            self.holds = frozenset(holds)
            self._told(self.holds)
