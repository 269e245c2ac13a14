"""The grader `exact`: the text after the last marker equals the reference answer."""

from __future__ import annotations

from ibtree.messages import Submission
from server_ext.rewards.answers import final_answer
from server_ext.rewards.base import require_answer


class ExactGrader:
    """1 if the marked final answer is the reference answer to the letter, else 0."""

    def __init__(self, marker: str) -> None:
        self._marker = marker

    def check(self, answer: str) -> None:
        require_answer(answer, "exact")

    async def grade(self, submission: Submission) -> float:
        expected = submission.answer.strip()
        return float(final_answer(submission.completion, self._marker) == expected)
