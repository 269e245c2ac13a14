"""A run's prompts, and their order: shuffled, and continued exactly by a resumed run."""

from __future__ import annotations

import random

from ibtree.data.questions import Question, read_questions
from ibtree.data.reading import reading_from
from learner.config import LearnerConfig


def questions_of(source: str, config: LearnerConfig) -> list[Question]:
    """Questions read as the run's settings say. Raises FieldError with the line or row."""
    return read_questions(source, reading_from(config))


class PromptStream:
    """An endless, seeded sequence over the questions, reshuffled every epoch.

    Number n is the same question in every run with the same seed, and its id is stable, so that
    submitting it again after a crash is a no-op on the server.
    """

    def __init__(self, questions: list[Question], seed: int, run_id: str) -> None:
        self._questions, self._seed = questions, seed
        self.run_id = run_id
        """The run that these prompts belong to on the server."""
        self._epoch, self._order = -1, list(range(len(questions)))

    def __getitem__(self, number: int) -> tuple[str, Question]:
        """Id and question of position `number`, from 0."""
        epoch, position = divmod(number, len(self._questions))
        if epoch != self._epoch:
            self._order = list(range(len(self._questions)))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
            self._epoch = epoch
        return f"{self.run_id}/{number}", self._questions[self._order[position]]

    def number_of(self, id_: str) -> int | None:
        """The position whose id this is; None for the id of another run."""
        run_id, _, number = id_.rpartition("/")
        return int(number) if run_id == self.run_id and number.isdecimal() else None
