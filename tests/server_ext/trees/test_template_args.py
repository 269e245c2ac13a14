"""Arguments of the model's chat template."""

from __future__ import annotations

import pytest

from ibtree.errors import FieldError
from ibtree.messages import Chat, ChatMessage
from server_ext.trees.text import Tokenizer
from tests.server_ext.trees.test_text import byte_level, saved

TEMPLATE = (
    "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}"
    "{% if style is defined %}{{ style }}{% endif %}"
)
TURNS = (ChatMessage("user", "1+1?"),)


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return Tokenizer(saved(tmp_path, byte_level()))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "1+1?"),
        ({"enable_thinking": False}, "1+1?<no>"),
        ({"enable_thinking": True, "style": "brief"}, "1+1?brief"),
        ({"unknown": 3}, "1+1?"),
    ],
)
def test_the_template_sees_them(tokenizer, arguments, text):
    assert tokenizer.decode(tokenizer.encode_chat(Chat(TURNS, arguments))) == text


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "tools", "conversation", "messages"])
def test_the_tokenizers_own_arguments_are_not_the_templates(tokenizer, name):
    """With them a caller could bring a template of his own."""
    with pytest.raises(FieldError, match=r"prompt\.chat"):
        tokenizer.encode_chat(Chat(TURNS, {name: "x"}))
