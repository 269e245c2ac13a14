"""Conversations on the wire, with the arguments of the model's template."""

from __future__ import annotations

import json
import math

import pytest

from ibtree.errors import FieldError
from ibtree.messages import Chat, ChatMessage, Prompt
from ibtree.tree.options import TreeOptions
from ibtree.wire.messages import prompt_from_proto, prompt_to_proto
from ibtree.wire.v1 import sampling_pb2

TURNS = (ChatMessage("system", "Ü."), ChatMessage("user", "1 + 1?\n"))
ARGS = {"enable_thinking": False, "depth": 3, "share": 0.5, "style": 'a "b"\n', "on": True}


def received(message: sampling_pb2.Prompt) -> Prompt:
    again = sampling_pb2.Prompt.FromString(message.SerializeToString())
    return prompt_from_proto(again, TreeOptions())


def encoded(**arguments: str) -> sampling_pb2.Prompt:
    return sampling_pb2.Prompt(chat=sampling_pb2.Chat(template_args=arguments))


@pytest.mark.parametrize("arguments", [{}, ARGS, {str(n): n for n in range(16)}])
def test_there_and_back(arguments):
    chat = Chat(TURNS, arguments)
    content = received(prompt_to_proto(Prompt(chat))).content
    assert content == chat
    kinds = {name: type(value) for name, value in content.template_args.items()}
    assert kinds == {name: type(value) for name, value in arguments.items()}
    assert hash(content) == hash(chat) and content != Chat(TURNS, {"depth": 9})


def test_equal_prompts_are_equal_bytes():
    """The queue knows a prompt again by its bytes."""
    messages = [
        prompt_to_proto(Prompt(Chat(TURNS, dict(a)))) for a in (ARGS.items(), [*ARGS.items()][::-1])
    ]
    first, second = (message.SerializeToString(deterministic=True) for message in messages)
    assert first == second


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[1]", '{"a": 1}', "NaN", "1e999", "True", "[" * 4000, "9" * 4097]
)
def test_what_is_no_scalar_in_json_is_refused(text):
    with pytest.raises(FieldError, match=r"prompt\.chat\.template_args: 'think'") as caught:
        received(encoded(think=text))
    assert "; allowed: " in str(caught.value) and len(str(caught.value)) < 400


def test_a_name_that_is_empty_or_too_many_are_refused():
    with pytest.raises(FieldError, match="template_args"):
        received(encoded(**{"": "1"}))
    with pytest.raises(FieldError, match="got 17; allowed: at most 16"):
        received(encoded(**{str(n): json.dumps(n) for n in range(17)}))


@pytest.mark.parametrize("value", [None, [1], {"a": 1}, math.inf, b"x"])
def test_a_client_refuses_what_the_wire_cannot_carry(value):
    with pytest.raises(FieldError, match=r"prompt\.chat\.template_args: 'think' is "):
        prompt_to_proto(Prompt(Chat(TURNS, {"think": value})))
