"""Prompts and answers, for training and for evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ibtree.data.answers import answer_text
from ibtree.data.reading import PLACEHOLDER, Reading, encodable
from ibtree.data.sources import rows
from ibtree.errors import FieldError
from ibtree.messages import Chat

__all__ = ["PLACEHOLDER", "Question", "Reading", "read_questions"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """A prompt, and its reference answer; empty: none."""

    prompt: str | Chat
    answer: str


def read_questions(
    source: str | Path,
    reading: Reading | None = None,
    tell: Callable[[str], None] = _log.warning,
) -> list[Question]:
    """The questions of a JSONL, JSON or Parquet file, of a folder or glob of them, or of a Hugging
    Face dataset `hf:NAME[:CONFIG[:SPLIT]]` (split train unless named).

    All rows are read and checked. Raises FieldError that names the file and line, or the row, of
    the first that is bad; with `skip_bad_rows` such rows are left out, and `tell` gets a line. It
    also gets one where most rows repeat the prompt of an earlier one.
    """
    tally = _Tally(reading or Reading())
    for where, values in rows(str(source), tally.reading.names):
        try:
            if isinstance(values, FieldError):
                raise values
            tally.add(where, *values)
        except FieldError as error:
            if not tally.reading.skip_bad_rows:
                raise
            tally.skip(error)
    if not tally.questions:
        problem = "; ".join([f"{source} holds no prompts", *tally.remarks()])
        raise FieldError("prompts", problem, "at least one")
    for remark in tally.remarks():
        tell(f"prompts {source}: {remark}")
    return tally.questions


class _Tally:
    """The questions so far, and what is to be said about them. Rows that repeat a question share
    it: DAPO-Math-17k's 1.8 million rows are 17,000 questions."""

    def __init__(self, reading: Reading) -> None:
        self.reading, self.questions = reading, list[Question]()
        self._first: dict[str | Chat, Question] = {}
        self._rows, self._skipped = 0, 0
        self._first_error: FieldError | None = None

    def add(self, where: str, prompt: object, answer: object) -> None:
        question = Question(
            self.reading.prompt(where, prompt), encodable(where, answer_text(where, answer))
        )
        self._rows += 1
        first = self._first.setdefault(question.prompt, question)
        if first is question or not self.reading.drop_repeats:
            self.questions.append(first if first.answer == question.answer else question)

    def skip(self, error: FieldError) -> None:
        self._rows += 1
        self._skipped += 1
        self._first_error = self._first_error or error

    def remarks(self) -> list[str]:
        lines, good = [], self._rows - self._skipped
        repeats = good - len(self._first)
        if self._skipped:
            lines.append(f"{self._skipped} of {self._rows} rows skipped: {self._first_error}")
        if self.reading.drop_repeats and repeats:
            lines.append(f"{repeats} of {good} rows repeat a prompt and are dropped")
        elif repeats > good / 2:
            remedy = "--drop-repeats keeps the first of each"
            lines.append(f"{repeats} of {good} rows repeat a prompt; {remedy}")
        return lines
