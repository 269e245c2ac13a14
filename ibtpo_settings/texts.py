"""Settings that are lists of texts, such as where an answer stops.

pydantic-settings takes a word of the command line apart at its commas and strips its white space,
so that a line break would become an empty text. Here a word is one text as it stands, or a JSON
list of texts, and an option that is given several times adds up.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_settings import NoDecode


def _texts(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        listed = json.loads(value)
    except ValueError:
        return (value,)
    texts = isinstance(listed, list) and all(isinstance(text, str) for text in listed)
    return tuple(listed) if texts else (value,)


Texts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_texts)]
"""The type of such a setting."""


def added_up(argv: list[str], options: Collection[str]) -> list[str]:
    """The command line, each of these options given once, with a JSON list of all its texts."""
    texts: dict[str, list[str]] = {}
    rest, waiting = [], list(reversed(argv))
    while waiting:
        word = waiting.pop()
        name, equals, value = word.partition("=")
        if name not in options:
            rest.append(word)
        elif equals:
            texts.setdefault(name, []).extend(_texts(value))
        elif waiting and not waiting[-1].startswith("--"):
            texts.setdefault(name, []).extend(_texts(waiting.pop()))
        else:
            rest.append(word)  # what it lacks is said where the line is parsed
    return [*rest, *(f"{name}={json.dumps(listed)}" for name, listed in texts.items())]
