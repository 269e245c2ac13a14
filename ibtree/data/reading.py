"""How rows are read: which fields hold prompt and answer, and what is made of the prompt."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ibtree.errors import FieldError
from ibtree.messages import Chat, ChatMessage

PLACEHOLDER = "{prompt}"
_ANSWERS = ("answer", "reward_model.ground_truth")
_TURN = ("role", "content")


@dataclass(frozen=True)
class Reading:
    """Choices of a user; their names are those of the learner's settings and of `ibtpo eval`.

    A field that is None is looked for: `prompt` and, where it is there, `answer`, or
    `reward_model.ground_truth` as in verl's files; else `question` and `answer`, as in GSM8K.
    Dots lead into fields. A prompt that is a list of messages is a conversation; a text becomes
    one with `chat`, `system_prompt` or `chat_template_args`. `prompt_template` is what is sent,
    {prompt} standing for the text, or for the last message that the user has in a conversation.
    """

    prompt_field: str | None = None
    answer_field: str | None = None
    prompt_template: str = PLACEHOLDER
    chat: bool = False
    system_prompt: str | None = None
    chat_template_args: Mapping[str, str | bool | int | float] = field(default_factory=dict)
    drop_repeats: bool = False
    skip_bad_rows: bool = False

    def __post_init__(self) -> None:
        if PLACEHOLDER not in self.prompt_template:
            problem = f"got {self.prompt_template!r}"
            raise FieldError("prompt_template", problem, f"text that holds {PLACEHOLDER}")
        encodable("prompt_template", self.prompt_template)
        encodable("system_prompt", self.system_prompt or "")

    def names(self, where: str, names: Collection[str]) -> tuple[str, str | None]:
        """Names of the prompt's and of the answer's field among those that are there. Raises
        FieldError if one is not."""
        prompt, answer = self.prompt_field, self.answer_field
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

    def prompt(self, where: str, value: Any) -> str | Chat:
        """What is sent for the prompt of a row. Raises FieldError."""
        if isinstance(value, str) and value:
            text = self._in_template(encodable(where, value))
            as_chat = self.chat or self.system_prompt is not None or self.chat_template_args
            return self._conversation([ChatMessage("user", text)]) if as_chat else text
        if not isinstance(value, list) or not value:
            allowed = "text, or a list of messages with role and content"
            raise FieldError(where, "the prompt is empty or no text", allowed)
        turns = [_turn(where, at, turn) for at, turn in enumerate(value)]
        asked = [at for at, turn in enumerate(turns) if turn.role == "user"] or [len(turns) - 1]
        last = turns[asked[-1]]
        turns[asked[-1]] = ChatMessage(last.role, self._in_template(last.content))
        return self._conversation(turns)

    def _in_template(self, text: str) -> str:
        return self.prompt_template.replace(PLACEHOLDER, text)

    def _conversation(self, turns: list[ChatMessage]) -> Chat:
        """The turns, with the system prompt in the place of their own."""
        if self.system_prompt is not None:
            rest = turns[1:] if turns[0].role == "system" else turns
            turns = [ChatMessage("system", self.system_prompt), *rest]
        return Chat(tuple(turns), self.chat_template_args)


def reading_from(settings: object) -> Reading:
    """The reading whose fields the settings have under the same names."""
    return Reading(**{f.name: getattr(settings, f.name) for f in fields(Reading)})


def encodable(where: str, text: str) -> str:
    """The text, which the wire can carry: JSON can write half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FieldError(where, str(error), "text in UTF-8") from error
    return text


def _turn(where: str, at: int, turn: Any) -> ChatMessage:
    role, content = (turn.get(k) if isinstance(turn, Mapping) else None for k in _TURN)
    if not (isinstance(role, str) and role and isinstance(content, str)):
        problem = f"message {at} of the prompt has no text in role and content"
        allowed = 'text, or messages {"role": "user", "content": "..."}'
        raise FieldError(where, problem, allowed)
    return ChatMessage(encodable(where, role), encodable(where, content))
