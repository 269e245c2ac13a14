"""Prompts and answers from a JSONL file, for training and for evaluation."""

from __future__ import annotations

import json
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
