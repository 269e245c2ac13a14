"""Graders: what one is, and those there are, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from ibtree.errors import FieldError
from ibtree.messages import Submission


class Grader(Protocol):
    """Grades one trajectory."""

    def check(self, answer: str) -> None:
        """Raises FieldError if a prompt with this reference answer cannot be graded."""

    async def grade(self, submission: Submission) -> float:
        """Reward in [0, 1]. A text that cannot be graded is 0. Raises GraderUnavailableError if
        nobody can grade now, which interrupts the tree, and GradingRefusedError for a trajectory
        that its service refuses, which fails it."""


@runtime_checkable
class TreeGrader(Protocol):
    """Grades the trajectories of a tree by each other, all of them anew whenever one is added."""

    def check(self, answer: str) -> None:
        """Raises FieldError if a prompt with this reference answer cannot be graded."""

    def vote(self, submission: Submission) -> str:
        """What the trajectory says, read once; empty: nothing."""

    def rewards(self, votes: Sequence[tuple[str, int]]) -> list[float]:
        """Rewards in [0, 1] of distinct trajectories, given what each says and how many rollouts
        ended with it."""


class Graders:
    """Graders by name."""

    def __init__(self, graders: dict[str, Grader | TreeGrader]) -> None:
        self._graders = graders

    def named(self, name: str) -> Grader | TreeGrader:
        """Raises FieldError for an unknown name."""
        if name not in self._graders:
            raise FieldError("grader", f"unknown grader {name!r}", " | ".join(self._graders))
        return self._graders[name]

    def check(self, name: str, answer: str) -> None:
        """Raises FieldError if a prompt with this answer cannot be graded by the grader."""
        self.named(name).check(answer)


def require_answer(answer: str, grader: str) -> None:
    """Raises FieldError if the reference answer that the grader needs is missing."""
    if not answer.strip():
        problem = f"missing, and the grader {grader!r} needs one"
        raise FieldError("answer", problem, "the reference answer as text")
