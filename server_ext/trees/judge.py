"""Rewards of one growing tree's trajectories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ibtree.messages import Submission
from server_ext.rewards.base import Grader, TreeGrader
from server_ext.trees.grower import Grade, Trajectory
from server_ext.trees.job import Job
from server_ext.trees.off_loop import OffLoop
from server_ext.trees.text import Tokenizer


class TreeJudge:
    """The grower's judge for one tree: grades a trajectory by itself, or by what the tree's other
    trajectories say."""

    def __init__(
        self, grader: Grader | TreeGrader, tokenizer: Tokenizer, job: Job, off_loop: OffLoop
    ) -> None:
        self._grader, self._tokenizer, self._job = grader, tokenizer, job
        self._off_loop = off_loop
        self._prompt_text: str | None = None
        self._votes: dict[Trajectory, str] = {}
        self._ends: Counter[Trajectory] = Counter()
        """What each distinct trajectory says, and how many rollouts ended with it."""

    async def grade(self, trajectory: Trajectory) -> Grade:
        if self._prompt_text is None:
            self._prompt_text = await self._text(self._job.token_ids)
        completion = await self._text(trajectory)
        job = self._job
        submission = Submission(self._prompt_text, completion, job.answer, job.tree_id)
        if isinstance(self._grader, TreeGrader):
            return self._grader.vote(submission)
        return await self._grader.grade(submission)

    def rewards(self, trajectory: Trajectory, grade: Grade) -> Mapping[Trajectory, float]:
        if not isinstance(self._grader, TreeGrader):
            return {trajectory: float(grade)}
        self._votes[trajectory] = str(grade)
        self._ends[trajectory] += 1
        votes = [(vote, self._ends[said]) for said, vote in self._votes.items()]
        return dict(zip(self._votes, self._grader.rewards(votes), strict=True))

    async def _text(self, token_ids: Trajectory) -> str:
        decode = self._tokenizer.decode
        return await self._off_loop.of_tokens(len(token_ids), decode, token_ids, special=False)
