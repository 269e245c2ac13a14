"""Graders of installed packages: functions under the entry point `ibtpo.rewards`."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ibtree.messages import Submission
from server_ext.rewards.base import require_answer
from server_ext.rewards.pool import GradingPool

ENTRY_POINTS = "ibtpo.rewards"


class InstalledGrader:
    """A function (prompt, completion, answer) -> reward in [0, 1], run in the grading processes.
    With an attribute `needs_answer = True` it is only called where there is a reference answer."""

    def __init__(self, point: EntryPoint, pool: GradingPool) -> None:
        self._point, self._pool = point, pool
        function = point.load()
        if not callable(function):
            raise TypeError(f"{ENTRY_POINTS}: {point.value} is not a function")
        self._needs_answer = bool(getattr(function, "needs_answer", False))

    def check(self, answer: str) -> None:
        if self._needs_answer:
            require_answer(answer, self._point.name)

    async def grade(self, submission: Submission) -> float:
        texts = (submission.prompt, submission.completion, submission.answer)
        return await self._pool.grade(self._point.name, call, self._point.value, *texts)


def installed_graders(pool: GradingPool) -> dict[str, InstalledGrader]:
    """Installed graders by name. Raises what importing one raises, TypeError for one that is no
    function."""
    return {point.name: InstalledGrader(point, pool) for point in entry_points(group=ENTRY_POINTS)}


def call(where: str, prompt: str, completion: str, answer: str) -> float:
    return float(_loaded(where)(prompt, completion, answer))


@cache
def _loaded(where: str) -> Any:
    """The function, loaded in the process: it might not survive the way there."""
    return EntryPoint("", where, ENTRY_POINTS).load()
