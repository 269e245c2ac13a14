"""Rewards of one growing tree's trajectories."""

from __future__ import annotations

from ibtree.messages import Submission
from ibtree.tree import Tree
from server_ext.rewards.base import Grader, TreeGrader
from server_ext.trees.job import Job
from server_ext.trees.off_loop import OffLoop
from server_ext.trees.text import Tokenizer


class Judge:
    """Grades a trajectory by itself, or by what the tree's other trajectories say."""

    def __init__(
        self, grader: Grader | TreeGrader, tokenizer: Tokenizer, job: Job, off_loop: OffLoop
    ) -> None:
        self._grader, self._tokenizer, self._job = grader, tokenizer, job
        self._off_loop = off_loop
        self._prompt_text: str | None = None
        self._votes: dict[tuple[int, ...], str] = {}
        self._voters: dict[int, str] = {}
        """Votes by the node that the trajectory ends with."""

    async def grade(self, token_ids: tuple[int, ...]) -> float:
        """Reward in [0, 1] of the trajectory of these generated ids."""
        if self._prompt_text is None:
            self._prompt_text = await self._text(self._job.token_ids)
        completion = await self._text(token_ids)
        job = self._job
        submission = Submission(self._prompt_text, completion, job.answer, job.tree_id)
        if isinstance(self._grader, TreeGrader):
            self._votes[token_ids] = self._grader.vote(submission)
            return 0.0  # until it is inserted
        return await self._grader.grade(submission)

    async def _text(self, token_ids: tuple[int, ...]) -> str:
        decode = self._tokenizer.decode
        return await self._off_loop.of_tokens(len(token_ids), decode, token_ids, special=False)

    def regraded(self, tree: Tree, end: int, token_ids: tuple[int, ...]) -> dict[int, float]:
        """Rewards by end node that change now that the trajectory is in the tree and ends with
        node `end`."""
        if not isinstance(self._grader, TreeGrader):
            return {}
        self._voters[end] = self._votes[token_ids]
        # a split may have merged two nodes: one trajectory, one vote
        said = {tree.alive(node): vote for node, vote in self._voters.items()}
        votes = [(vote, tree.ends[node]) for node, vote in said.items()]
        return dict(zip(said, self._grader.rewards(votes), strict=True))
