"""The grader `self_consistency`: agreement with the majority of the tree; no reference needed.

For test-time search, and for learning without labels (arXiv 2203.11171, 2504.16084).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ibtree.messages import Submission
from server_ext.rewards.answers import boxed_answer, canonical, final_answer, last_number


class SelfConsistencyGrader:
    """1 if the final answer is the one that most rollouts of the tree gave, else 0.

    The final answer is the text after the last marker, else the last \\boxed{}, else the last
    number; without one the reward is 0 and the rollout has no vote. Answers that tie are all the
    majority: the order in which rollouts end must not decide.
    """

    def __init__(self, marker: str) -> None:
        self._marker = marker

    def check(self, answer: str) -> None:
        """A reference answer is not looked at."""

    def vote(self, submission: Submission) -> str:
        text = submission.completion
        return canonical(
            final_answer(text, self._marker) or boxed_answer(text) or last_number(text)
        )

    def rewards(self, votes: Sequence[tuple[str, int]]) -> list[float]:
        totals: Counter[str] = Counter()
        for answer, rollouts in votes:
            if answer:
                totals[answer] += rollouts
        most = max(totals.values(), default=0)
        return [float(bool(answer) and totals[answer] == most) for answer, _ in votes]
