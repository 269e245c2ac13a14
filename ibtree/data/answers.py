"""Reference answers, as rows hold them: texts, numbers, worked ones in GSM8K's form."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

from ibtree.errors import FieldError

_MARK = "####"


def answer_text(where: str, answer: Any) -> str:
    """The answer as text, empty for None. Of a worked one, what follows the mark in the last line
    that begins with it. Raises FieldError for anything but text and finite numbers."""
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
    if _MARK not in answer:
        return answer
    marked = [line for line in answer.splitlines() if line.startswith(_MARK)]
    if not marked:
        return answer
    final = marked[-1].removeprefix(_MARK).strip()
    if not final:
        raise FieldError(where, f"the answer has nothing after {_MARK}", f"{_MARK} 18")
    return final
