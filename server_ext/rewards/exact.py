"""The grader `exact`: the text after the last marker equals the reference answer."""

from __future__ import annotations

from server_ext.rewards.base import Submission


def final_answer(completion: str, marker: str) -> str:
    """The rest of the line after the last `marker`, stripped; empty if there is none."""
    _, found, rest = completion.rpartition(marker)
    return rest.strip().split("\n", 1)[0].strip() if found else ""


class ExactGrader:
    """1 if the marked final answer is the reference answer to the letter, else 0."""

    needs_answer = True

    def __init__(self, marker: str) -> None:
        self._marker = marker

    async def grade(self, submission: Submission) -> float:
        expected = submission.answer.strip()
        return float(final_answer(submission.completion, self._marker) == expected)
