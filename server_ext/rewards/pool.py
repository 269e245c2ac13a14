"""Processes in which graders run that may hang or crash.

A grade that takes too long, or kills its process, may be its text's fault or that of a busy
machine. So it is graded once more, in processes that do nothing else; if it goes wrong there too,
the text is to blame, and the grade is 0.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pebble import ProcessExpired, ProcessPool

from server_ext.errors import GraderUnavailableError

_TASKS_PER_PROCESS = 20_000  # sympy's caches grow
_log = logging.getLogger(__name__)


class Zero(StrEnum):
    """Why a grade counts as 0 that nobody gave."""

    TIMEOUT = "timeout"
    DIED = "died"
    """Its process did."""
    RAISED = "raised"
    NO_REWARD = "no_reward"
    """What came back is no number in [0, 1]."""


@dataclass(frozen=True)
class Failure:
    """What went wrong; `cause` is None if nobody could grade."""

    cause: Zero | None
    problem: str


class GradingPool:
    """`workers` processes, and half as many for second tries; a grade that hangs or crashes costs
    its process and two time limits. `zeroed` is told of each grade that counts as 0 for that."""

    def __init__(
        self, workers: int, timeout_s: float, zeroed: Callable[[Zero], None] = lambda _: None
    ) -> None:
        self._timeout_s, self._zeroed = timeout_s, zeroed
        self._many, self._second_tries = _Processes(workers), _Processes(max(workers // 2, 1))

    async def grade(self, grader: str, function: Callable[..., float], *arguments: str) -> float:
        """What the function returns; 0, with a warning, if that is no number in [0, 1], if it
        raises, or if it dies or takes more than the time limit twice. The limit begins when it
        does. Raises GraderUnavailableError if the processes die by themselves, and if the function
        raises an OSError, or something caused by one: what it needs is away."""
        outcome = await self._outcome(self._many, function, arguments)
        if isinstance(outcome, Failure) and outcome.cause in (Zero.TIMEOUT, Zero.DIED):
            _log.info("%s: %s; it is graded once more", grader, outcome.problem)
            outcome = await self._outcome(self._second_tries, function, arguments)
        if isinstance(outcome, float):
            return outcome
        if outcome.cause is None:
            raise GraderUnavailableError(f"{grader}: {outcome.problem}")
        _log.warning("%s: %r; the grade counts as 0", grader, outcome.problem)
        self._zeroed(outcome.cause)
        return 0.0

    async def _outcome(
        self, processes: _Processes, function: Callable[..., float], arguments: tuple[str, ...]
    ) -> float | Failure:
        for _ in range(2):
            pool = processes.pool()
            try:
                task = pool.schedule(_graded, args=[function, *arguments], timeout=self._timeout_s)
                return await asyncio.wrap_future(task)
            except TimeoutError:
                return Failure(Zero.TIMEOUT, f"a grade took more than {self._timeout_s} s")
            except ProcessExpired as error:
                return Failure(Zero.DIED, f"a grading process died ({error})")
            except RuntimeError:  # a process died without a grade to blame: pebble ends the pool
                await processes.replace(pool)
        return Failure(None, "the grading processes die")

    def close(self) -> None:
        for processes in (self._many, self._second_tries):
            processes.stop()


class _Processes:
    """A pool of pebble's, started when it is wanted first."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: ProcessPool | None = None

    def pool(self) -> ProcessPool:
        if self._pool is None:
            self._pool = ProcessPool(
                max_workers=self._workers,
                max_tasks=_TASKS_PER_PROCESS,
                initializer=_load_library,
                context=multiprocessing.get_context("spawn"),
            )
        return self._pool

    async def replace(self, broken: ProcessPool) -> None:
        if self._pool is broken:  # only the first of those who saw it break
            self._pool = None
            await asyncio.to_thread(_stop, broken)  # may take seconds

    def stop(self) -> None:
        if self._pool:
            _stop(self._pool)


def _stop(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


def _load_library() -> None:
    """Spends the seconds of imports, and of what parsers build at first use: they must not count as
    a grade's."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # warns that its timers are off
    formulas = [math_verify.parse(f"${text}$", parsing_timeout=None) for text in ("x+1", "1+x")]
    math_verify.verify(*formulas, timeout_seconds=None)


def _graded(function: Callable[..., float], *arguments: Any) -> float | Failure:
    """The outcome, in the process. An exception is told in words: some do not survive the way
    back, and pebble would raise a SystemExit in the server."""
    try:
        reward = float(function(*arguments))
    except BaseException as error:
        away = any(isinstance(cause, OSError) for cause in _causes(error))
        problem = f"{type(error).__name__}: {error}"[:500]
        return Failure(None if away else Zero.RAISED, problem)
    if 0.0 <= reward <= 1.0:
        return reward
    return Failure(Zero.NO_REWARD, f"the reward {reward} is not in [0, 1]")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from: clients of services wrap the socket's own error."""
    while error is not None:
        yield error
        error = error.__cause__
