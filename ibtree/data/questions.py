"""Prompts and answers, for training and for evaluation."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from ibtree.data.sources import rows
from ibtree.errors import FieldError
from ibtree.messages import Chat, ChatMessage

PLACEHOLDER = "{prompt}"
_ANSWER_MARK = "####"
_ANSWERS = ("answer", "reward_model.ground_truth")
_TURN = ("role", "content")


@dataclass(frozen=True)
class Question:
    """A prompt, and its reference answer; empty: none."""

    prompt: str | Chat
    answer: str


def read_questions(
    source: str | Path,
    prompt_field: str | None = None,
    answer_field: str | None = None,
    template: str = PLACEHOLDER,
) -> list[Question]:
    """The questions of a JSONL or Parquet file, or of a Hugging Face dataset
    `hf:NAME[:CONFIG[:SPLIT]]` (split train unless named).

    A field that is None is found: `prompt` and, where it is there, `answer`, or
    `reward_model.ground_truth` as in verl's files; else `question` and `answer`, as in GSM8K. A
    prompt may be a list of messages. An answer with a line `#### 18`, GSM8K's way to end a worked
    one, is 18. `template` is the prompt with {prompt} in place of the field's text, or of the last
    message's. Raises FieldError with the line or row for anything but text, and numbers as answers.
    """
    if PLACEHOLDER not in template:
        raise FieldError("prompt_template", f"got {template!r}", f"text that holds {PLACEHOLDER}")
    pick = partial(_pick, prompt_field, answer_field)
    questions = []
    for where, prompt, answer in rows(str(source), pick):
        asked = _asked(where, prompt, template)
        questions.append(Question(asked, _encodable(where, _answer(where, answer))))
    if not questions:
        raise FieldError("prompts", f"{source} holds no prompts", "at least one")
    return questions


def _asked(where: str, prompt: Any, template: str) -> str | Chat:
    """Text in the template; of a conversation its last message is."""
    if isinstance(prompt, str) and prompt:
        return template.replace(PLACEHOLDER, _encodable(where, prompt))
    if not isinstance(prompt, list) or not prompt:
        allowed = "text, or a list of messages with role and content"
        raise FieldError(where, "the prompt is empty or no text", allowed)
    turns = []
    for at, turn in enumerate(prompt):
        role, content = (turn.get(k) if isinstance(turn, Mapping) else None for k in _TURN)
        if not (isinstance(role, str) and role and isinstance(content, str)):
            problem = f"message {at} of the prompt has no text in role and content"
            allowed = 'text, or messages {"role": "user", "content": "..."}'
            raise FieldError(where, problem, allowed)
        turns.append(ChatMessage(_encodable(where, role), _encodable(where, content)))
    last = turns[-1]
    turns[-1] = ChatMessage(last.role, template.replace(PLACEHOLDER, last.content))
    return Chat(tuple(turns))


def _pick(
    prompt: str | None, answer: str | None, where: str, names: Collection[str]
) -> tuple[str, str | None]:
    """Names of the two fields among those that are there."""
    if prompt is None:
        gsm8k = "prompt" not in names and {"question", "answer"} <= {*names}
        prompt = "question" if gsm8k else "prompt"
    if answer is None:
        answer = next((name for name in _ANSWERS if name in names), None)
    for name in (prompt, answer):
        if name is not None and name not in names:
            allowed = "text in prompt and answer, or in prompt_field and answer_field"
            raise FieldError(where, f"no field {name!r} in {[*names]}", allowed)
    return prompt, answer


def _answer(where: str, answer: Any) -> str:
    if answer is None:
        return ""
    if isinstance(answer, str):
        return _final(where, answer)
    if isinstance(answer, bool) or not isinstance(answer, int | float | Decimal):
        raise FieldError(where, f"the answer is a {type(answer).__name__}", "text or a number")
    if not math.isfinite(answer):
        raise FieldError(where, f"the answer is {answer}", "text or a finite number")
    whole = answer == int(answer)  # tables often hold 18 as 18.0
    return str(int(answer)) if whole else str(answer)


def _final(where: str, answer: str) -> str:
    """What follows the mark in the last line that begins with it, if there is one."""
    marked = [line for line in answer.splitlines() if line.startswith(_ANSWER_MARK)]
    if not marked:
        return answer
    final = marked[-1].removeprefix(_ANSWER_MARK).strip()
    if not final:
        raise FieldError(
            where, f"the answer has nothing after {_ANSWER_MARK}", f"{_ANSWER_MARK} 18"
        )
    return final


def _encodable(where: str, text: str) -> str:
    """The text, which the wire can carry: JSON can write half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FieldError(where, str(error), "text in UTF-8") from error
    return text
