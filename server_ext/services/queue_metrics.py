"""What the queue and the graders count, as Prometheus metrics."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge

from ibtree.errors import IbtpoError
from server_ext.queue.intake import Hold
from server_ext.queue.producer import Outcome
from server_ext.queue.states import State
from server_ext.rewards.pool import Zero

_LOOK_EVERY_S = 5.0
_log = logging.getLogger(__name__)


class QueueMetrics:
    """Names begin with `ibtpo_`; every label is there from the start, at 0."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._trees = Gauge(
            "ibtpo_queue_trees", "Trees in the journal now, by state", ["state"], registry=registry
        )
        self._outcomes = Counter(
            "ibtpo_growths", "Growths of queued prompts, by how they ended", ["outcome"],
            registry=registry,
        )  # fmt: skip
        self._holds = Gauge(
            "ibtpo_queue_held", "1: no prompts are taken, or none of some run, for this reason",
            ["reason"], registry=registry,
        )  # fmt: skip
        self._zeroed = Counter(
            "ibtpo_grades_zeroed", "Grades that count as 0 because grading went wrong, by how",
            ["cause"], registry=registry,
        )  # fmt: skip
        self._lost_accounts = Counter(
            "ibtpo_lost_accounts", "Trees of which the radix cache did not tell what they reused",
            registry=registry,
        )  # fmt: skip
        for outcome in Outcome:
            self._outcomes.labels(outcome)
        for zero in Zero:
            self._zeroed.labels(zero)
        self.held(())

    def ended(self, outcome: Outcome) -> None:
        """A growth ended."""
        self._outcomes.labels(outcome).inc()

    def held(self, holds: Collection[Hold]) -> None:
        """What holds up the queue from now on."""
        for hold in Hold:
            self._holds.labels(hold).set(hold in holds)

    def zeroed(self, cause: Zero) -> None:
        """A grade counts as 0."""
        self._zeroed.labels(cause).inc()

    def account_lost(self) -> None:
        """A tree's reuse got lost."""
        self._lost_accounts.inc()

    async def watch(self, counts: Callable[[], Awaitable[Mapping[State, int]]]) -> None:
        """Looks at the journal every few seconds, for ever."""
        while True:
            try:
                for state, count in (await counts()).items():
                    self._trees.labels(state).set(count)
            except IbtpoError as error:
                _log.warning("%s", error)
            await asyncio.sleep(_LOOK_EVERY_S)
