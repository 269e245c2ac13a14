"""The grader `math`: symbolic comparison by the math-verify library, in processes of its own.

A formula can make sympy run for ever, so each grade has a time limit after which its process is
killed and replaced.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import re
from concurrent.futures import TimeoutError as FutureTimeout

from pebble import ProcessExpired, ProcessPool

from server_ext.rewards.base import Submission
from server_ext.rewards.exact import final_answer

_PROSE = re.compile(r"\b[A-Za-z]{3,}")
_NUMBER = re.compile(r"[-+]?\d+([ ,]\d{3})*(\.\d+)?( \d+/\d+)?")
_log = logging.getLogger(__name__)


def verify_math(completion: str, answer: str, marker: str) -> float:
    """1.0 if the completion's final answer is mathematically equal to the reference, else 0.0.

    The final answer is the text after the last marker, else what math-verify finds (a \\boxed{}
    or the last formula or number). The library's own timers need a main thread: switched off.
    """
    from math_verify import parse, verify

    marked = final_answer(completion, marker)
    gold = parse(_as_formula(answer), parsing_timeout=None)
    found = parse(_as_formula(marked) if marked else completion, parsing_timeout=None)
    return float(verify(gold, found, timeout_seconds=None))


def _as_formula(answer: str) -> str:
    """Bare LaTeX is only read as a whole between dollars; outside, just its last number is.
    That is what is wanted of prose ("18 dollars"), and of plain numbers ("1 000")."""
    prose = "\\" not in answer and _PROSE.search(answer)
    as_it_is = prose or "$" in answer or "\\boxed" in answer or _NUMBER.fullmatch(answer.strip())
    return answer if as_it_is else f"${answer}$"


def _load_library() -> None:
    """Seconds of imports that must not count as a grade's."""
    import math_verify  # noqa: F401


class MathGrader:
    """math-verify in `workers` processes; a hung or crashed grade costs one time limit."""

    needs_answer = True

    def __init__(self, workers: int, timeout_s: float, marker: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPool(
            max_workers=workers, max_tasks=2000, initializer=_load_library, context=context
        )
        self._timeout_s, self._marker = timeout_s, marker

    async def grade(self, submission: Submission) -> float:
        arguments = [submission.completion, submission.answer, self._marker]
        future = self._pool.schedule(verify_math, args=arguments, timeout=self._timeout_s)
        try:
            return await asyncio.wrap_future(future)
        except (FutureTimeout, TimeoutError):
            _log.warning("math: a grade took more than %s s and counts as 0", self._timeout_s)
        except ProcessExpired as error:
            _log.warning("math: a grading process died (%s); the grade counts as 0", error)
        except Exception as error:  # whatever sympy raises on odd input is a wrong answer
            _log.warning("math: %s: %s; the grade counts as 0", type(error).__name__, error)
        return 0.0

    def close(self) -> None:
        self._pool.stop()
        self._pool.join()
