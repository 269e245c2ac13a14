"""Final answers and numbers in texts; plain numbers are compared as math-verify compares them."""

from __future__ import annotations

import random

import pytest

from server_ext.rewards.answers import boxed_answer, canonical, last_number, same_number
from server_ext.rewards.math import as_formula, verify_math


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (r"so \boxed{ 7 }.", "7"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} }", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{7", ""),
        (r"\boxed{{7}", ""),
        (r"\boxed{" + "7" * 5000 + "}", ""),
        (r"\boxed 7", ""),
        ("7", ""),
        ("", ""),
    ],
)
def test_the_boxed_answer(completion, expected):
    assert boxed_answer(completion) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("it is 18, not 17.", "17"),
        ("it is $1,234.50 a day", "1,234.50"),
        ("1, 2, 3", "3"),
        ("from 5 to -3", "-3"),
        ("no", ""),
        ("", ""),
    ],
)
def test_the_last_number(completion, expected):
    assert last_number(completion) == expected


@pytest.mark.parametrize(
    ("writings", "spelling"),
    [
        (["1000", "1,000", "1000.0", "+1000", "$1,000.00", r"\$1000", " 1000. ", "01000"], "1000"),
        (["0.5", ".5", "00.50"], "0.5"),
        (["-3", "-3.0", "-03"], "-3"),
        (["0", "-0", "0.000", "+0."], "0"),
        (["Paris", " paris.", "PARIS"], "paris"),
        (["x  +\t1", "x + 1"], "x + 1"),
        (["9" * 10_000, "0" + "9" * 10_000 + ".0"], "9" * 10_000),
        (["1.0000000000000000000000001"], "1.0000000000000000000000001"),
        (["1,0000"], "1,0000"),
        (["", " ", "$", "."], ""),
    ],
)
def test_one_spelling_of_an_answer(writings, spelling):
    assert {canonical(writing) for writing in writings} == {spelling}


def a_number(rng: random.Random) -> str:
    number = rng.randrange(10 ** rng.choice([1, 1, 2, 3, 4, 6, 9, 12]))
    text = f"{number:,}" if rng.random() < 0.3 else str(number)
    if rng.random() < 0.4:
        text += "." + "".join(rng.choice("00123456789") for _ in range(rng.randrange(1, 8)))
    return "-" * (rng.random() < 0.2) + "0" * (rng.random() < 0.05) + text


def like(number: str, rng: random.Random) -> str:
    """Often the same number, or nearly."""
    plain, at = number.replace(",", ""), rng.randrange(len(number))
    ways = [
        plain,
        plain + ("0" if "." in plain else ".00"),
        plain.lstrip("-"),
        plain[:-1] or "0",
        number[:at] + rng.choice("0123456789") + number[at + 1 :],
        a_number(rng),
    ]
    return rng.choice(ways)


def test_plain_numbers_are_compared_as_math_verify_does():
    rng, verdicts = random.Random(0), []
    for _ in range(4000):
        answer = a_number(rng)
        other = like(answer, rng)
        verdict = same_number(other, answer)
        if verdict is not None:
            verdicts.append(verdict)
            assert verdict == verify_math(as_formula(other), as_formula(answer)), (other, answer)
    assert len(verdicts) > 2500 and 1000 < sum(verdicts) < len(verdicts) - 500


@pytest.mark.parametrize(
    "text", ["", "x", "1/2", "1 000", "+3", "٣", "1e3", "5%", "007", "1,00", "0.1234567", "1" * 17]
)
def test_other_numbers_are_left_to_the_library(text):
    assert same_number(text, "7") is None and same_number("7", text) is None
