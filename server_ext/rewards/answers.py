"""Final answers in completions, and numbers written plainly: quick for any text."""

from __future__ import annotations

import re
from fractions import Fraction

_BOXED = r"\boxed{"
_NUMBER = re.compile(r"([-+]?)(\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.(\d+))?")
_SHORT = re.compile(r"-?(?:[1-9]\d{0,2}(?:,\d{3})+|0|[1-9]\d*)(?:\.\d{1,6})?")
_SHORT_CHARACTERS = 16
_BOX_CHARACTERS = 2_000
"""Longest answer in a box; what is longer is none."""
TAIL_CHARACTERS = 20_000
"""How much of a completion is searched, from its end, for an answer without mark and box."""


def final_answer(completion: str, marker: str) -> str:
    """The rest of the line after the last `marker`, stripped; empty if there is none."""
    _, mark, rest = completion.rpartition(marker)
    return rest.strip().split("\n", 1)[0].strip() if mark else ""


def boxed_answer(completion: str) -> str:
    """What is in the last \\boxed{}, stripped; empty if there is none or it does not close."""
    _, box, rest = completion.rpartition(_BOXED)
    if not box:
        return ""
    depth = 1
    for at, character in enumerate(rest[:_BOX_CHARACTERS]):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if not depth:
            return rest[:at].strip()
    return ""


def last_number(completion: str) -> str:
    """The last number in the completion's tail, or nothing."""
    number = ""
    for match in _NUMBER.finditer(completion[-TAIL_CHARACTERS:]):
        number = match[0]
    return number


def canonical(answer: str) -> str:
    """One spelling of a number (1,000 = 1000 = +1000.0); other text in lower case, with single
    spaces, without dollar signs and a full stop at the end."""
    text = " ".join(re.sub(r"\\?\$", "", answer.lower()).split()).removesuffix(".")
    number = _NUMBER.fullmatch(text)
    if not number:
        return text
    sign, whole, fraction = number.groups()
    whole = whole.replace(",", "").lstrip("0") or "0"
    fraction = (fraction or "").rstrip("0")
    zero = whole == "0" and not fraction
    return ("-" if sign == "-" and not zero else "") + whole + (f".{fraction}" if fraction else "")


def same_number(answer: str, other: str) -> bool | None:
    """Whether two numbers are equal, or None if either is not one that is written plainly and
    shortly enough that a double holds it and six decimals tell it (as math-verify compares)."""
    texts = [answer.strip(), other.strip()]
    for text in texts:
        if len(text) > _SHORT_CHARACTERS or not (text.isascii() and _SHORT.fullmatch(text)):
            return None
    first, second = (Fraction(text.replace(",", "")) for text in texts)
    return first == second
