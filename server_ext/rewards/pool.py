"""Processes in which graders run that may hang or crash."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
from collections.abc import Callable
from typing import Any

from pebble import ProcessExpired, ProcessPool

Verdict = float | str
"""A reward, or why there is none."""
_TASKS_PER_PROCESS = 20_000  # sympy's caches grow
_log = logging.getLogger(__name__)


class GradingPool:
    """`workers` processes; a grade that hangs or crashes costs its process and one time limit."""

    def __init__(self, workers: int, timeout_s: float) -> None:
        self._workers, self._timeout_s = workers, timeout_s
        self._pool = self._started()

    def _started(self) -> ProcessPool:
        return ProcessPool(
            max_workers=self._workers,
            max_tasks=_TASKS_PER_PROCESS,
            initializer=_load_library,
            context=multiprocessing.get_context("spawn"),
        )

    async def grade(self, grader: str, function: Callable[..., float], *arguments: str) -> float:
        """What the function returns; 0, with a warning, if that is no number in [0, 1], if it
        raises, dies or takes more than the time limit, which begins when it does."""
        verdict = await self._verdict(function, arguments)
        if isinstance(verdict, float):
            return verdict
        _log.warning("%s: %s; the grade counts as 0", grader, verdict)
        return 0.0

    async def _verdict(self, function: Callable[..., float], arguments: tuple[str, ...]) -> Verdict:
        for _ in range(2):
            pool = self._pool
            try:
                task = pool.schedule(_graded, args=[function, *arguments], timeout=self._timeout_s)
                return await asyncio.wrap_future(task)
            except TimeoutError:
                return f"a grade took more than {self._timeout_s} s"
            except ProcessExpired as error:
                return f"a grading process died ({error})"
            except RuntimeError:  # a process died without a grade to blame: pebble ends the pool
                await self._replace(pool)
        return "the grading processes die"

    async def _replace(self, broken: ProcessPool) -> None:
        if self._pool is broken:  # only the first of those who saw it break
            self._pool = self._started()
            await asyncio.to_thread(_stop, broken)  # may take seconds

    def close(self) -> None:
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


def _graded(function: Callable[..., float], *arguments: Any) -> Verdict:
    """The verdict, in the process. An exception is told in words: some do not survive the way
    back, and pebble would raise a SystemExit in the server."""
    try:
        reward = float(function(*arguments))
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:500]
    return reward if 0.0 <= reward <= 1.0 else f"the reward {reward} is not in [0, 1]"
