"""Prompts from a JSONL file, in a shuffled order that a resumed run continues exactly."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from ibtree.errors import FieldError


@dataclass(frozen=True)
class Question:
    """One line of the file."""

    prompt: str
    answer: str


def read_questions(path: Path) -> list[Question]:
    """Raises FieldError with the line for anything but {"prompt": text, "answer": text}."""
    if not path.is_file():
        raise FieldError("prompts", f"no file {path}", "a JSONL file")
    questions = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"prompts {path}:{number}"
            try:
                entry = json.loads(line.decode("utf-8"))
                prompt, answer = entry["prompt"], entry.get("answer")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                allowed = 'objects {"prompt": text, "answer": text}'
                raise FieldError(where, f"{error!r}", allowed) from error
            if not isinstance(prompt, str) or not prompt:
                raise FieldError(where, "the prompt is empty or no text", "text")
            questions.append(Question(prompt, "" if answer is None else str(answer)))
    if not questions:
        raise FieldError("prompts", f"{path} holds no prompts", "at least one line")
    return questions


class PromptStream:
    """An endless, seeded sequence over the questions, reshuffled every epoch.

    Number n is the same question in every run with the same seed, and its id is stable, so that
    submitting it again after a crash is a no-op on the server.
    """

    def __init__(self, questions: list[Question], seed: int, run_id: str) -> None:
        self._questions, self._seed, self._run_id = questions, seed, run_id
        self._epoch, self._order = -1, list(range(len(questions)))

    def __getitem__(self, number: int) -> tuple[str, Question]:
        """Id and question of position `number`, from 0."""
        epoch, place = divmod(number, len(self._questions))
        if epoch != self._epoch:
            self._order = list(range(len(self._questions)))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
            self._epoch = epoch
        return f"{self._run_id}/{number}", self._questions[self._order[place]]
