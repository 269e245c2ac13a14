"""The grader `math`: symbolic comparison by the math-verify library, in the grading processes."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from ibtree.errors import FieldError
from ibtree.messages import Submission
from server_ext.rewards.answers import TAIL_CHARACTERS, boxed_answer, final_answer, same_number
from server_ext.rewards.base import require_answer
from server_ext.rewards.pool import GradingPool

_PROSE = re.compile(r"\b[A-Za-z]{3,}")
_NUMBER = re.compile(r"-?\d+([ ,]\d{3})*(\.\d+)?")
_MIXED = re.compile(r"([-+]?\d+) (\d+)/(\d+)")

_MOST_CHARACTERS = 2_000
"""Longest reference answer."""


class MathGrader:
    """1 if the final answer is mathematically equal to the reference, else 0.

    The final answer is the text after the last marker, else the only \\boxed{}, else what
    math-verify finds. Numbers written plainly are compared here, without a process.
    """

    def __init__(self, pool: GradingPool, marker: str) -> None:
        self._pool, self._marker = pool, marker

    def check(self, answer: str) -> None:
        require_answer(answer, "math")
        if len(answer) > _MOST_CHARACTERS:
            problem = f"{len(answer)} characters"
            raise FieldError("answer", problem, f"at most {_MOST_CHARACTERS} for the grader 'math'")

    async def grade(self, submission: Submission) -> float:
        completion, answer = submission.completion, submission.answer
        marked = final_answer(completion, self._marker)
        boxed = boxed_answer(completion) if completion.count(r"\boxed") == 1 else ""
        equal = same_number(marked or boxed or completion, answer)
        if equal is not None:
            return float(equal)
        text = as_formula(marked) if marked else rf"\boxed{{{boxed}}}" if boxed else completion
        text = text[-TAIL_CHARACTERS:]
        return await self._pool.grade("math", verify_math, text, as_formula(answer))


def as_formula(answer: str) -> str:
    """The answer between dollars, where bare LaTeX is read as a whole; outside, just its last
    number is. That is what is wanted of prose ("18 dollars"), and of plain numbers ("1 000")."""
    answer = answer.strip()
    if mixed := _MIXED.fullmatch(answer):
        whole, above, below = mixed.groups()
        return rf"${whole}\frac{{{above}}}{{{below}}}$"
    prose = "\\" not in answer and _PROSE.search(answer)
    as_it_is = prose or "$" in answer or "\\boxed" in answer or _NUMBER.fullmatch(answer)
    return answer if as_it_is else f"${answer}$"


def verify_math(text: str, answer: str) -> float:
    """1.0 if what math-verify finds in the text equals what it finds in the reference, else 0.0.
    The library's own timers need a main thread: switched off."""
    from math_verify import verify

    return float(verify(_parsed(answer), _parsed(text), timeout_seconds=None))


@lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    """What math-verify reads; trajectories of a tree have one reference and few final answers."""
    from math_verify import parse

    return parse(text, parsing_timeout=None)
