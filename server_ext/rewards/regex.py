"""The grader `regex`: the reference answer is a pattern for the final answer."""

from __future__ import annotations

import re

from ibtree.errors import FieldError
from ibtree.messages import Submission
from server_ext.rewards.answers import final_answer
from server_ext.rewards.base import require_answer
from server_ext.rewards.pool import GradingPool

_MOST_CHARACTERS = 1000  # of a pattern: larger ones take long to compile
_ALLOWED = f"a Python regular expression of at most {_MOST_CHARACTERS} characters"


class RegexGrader:
    """1 if the pattern matches the whole marked final answer, else 0: like `exact`, which it
    becomes for a pattern without special characters. What stands elsewhere in the completion
    does not count, so naming many answers does not help."""

    def __init__(self, pool: GradingPool, marker: str) -> None:
        self._pool, self._marker = pool, marker

    def check(self, answer: str) -> None:
        require_answer(answer, "regex")
        if len(answer) > _MOST_CHARACTERS:
            raise FieldError("answer", f"a pattern of {len(answer)} characters", _ALLOWED)
        try:
            re.compile(answer.strip())
        except (re.error, OverflowError, RecursionError) as error:
            raise FieldError("answer", f"no pattern: {error}", _ALLOWED) from error

    async def grade(self, submission: Submission) -> float:
        final = final_answer(submission.completion, self._marker)
        if not final:
            return 0.0  # also where the pattern allows nothing
        return await self._pool.grade("regex", matches, submission.answer.strip(), final)


def matches(pattern: str, text: str) -> float:
    """1.0 if the pattern matches the whole text, else 0.0; some take for ever on some texts."""
    return float(re.fullmatch(pattern, text) is not None)
