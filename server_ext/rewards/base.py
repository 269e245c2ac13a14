"""What a grader is, and those there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ibtree.errors import FieldError


@dataclass(frozen=True)
class Submission:
    """A finished trajectory as text, special tokens left out; `answer` is the reference answer."""

    prompt: str
    completion: str
    answer: str


class Grader(Protocol):
    """Grades one trajectory."""

    needs_answer: bool

    async def grade(self, submission: Submission) -> float:
        """Reward in [0, 1]. A grader that fails or takes too long gives 0, it never raises."""


class Graders:
    """Graders by name."""

    def __init__(self, graders: dict[str, Grader]) -> None:
        self._graders = graders

    def named(self, name: str) -> Grader:
        """Raises FieldError for an unknown name."""
        if name not in self._graders:
            raise FieldError("grader", f"unknown grader {name!r}", " | ".join(self._graders))
        return self._graders[name]

    def check(self, name: str, answer: str) -> None:
        """Raises FieldError if a prompt with this answer cannot be graded by the grader."""
        if self.named(name).needs_answer and not answer.strip():
            problem = f"missing, and the grader {name!r} needs one"
            raise FieldError("answer", problem, "the reference answer as text")
