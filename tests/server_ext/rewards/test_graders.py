"""The graders by name, exact, and math with the real library in real processes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from ibtree.errors import FieldError
from ibtree.messages import Submission
from server_ext.rewards.answers import final_answer
from server_ext.rewards.base import Graders
from server_ext.rewards.exact import ExactGrader
from server_ext.rewards.math import MathGrader
from server_ext.rewards.pool import GradingPool

EXACT = ExactGrader("####")
MATRIX = r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"


@pytest.fixture(scope="module")
def maths() -> Iterator[MathGrader]:
    pool = GradingPool(1, 60.0)
    yield MathGrader(pool, "####")
    pool.close()


def grade(grader, completion: str, answer: str):
    return grader.grade(Submission("Q", completion, answer))


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("so #### 42", "42"),
        ("####42", "42"),
        ("#### 1\n#### 2", "2"),  # the last marker wins
        ("#### 1 #### 2", "2"),
        ("####   4 2 \t\nand so on", "4 2"),
        ("####\r\n42", "42"),
        ("#### 42\r\n", "42"),
        ("####", ""),
        ("#### ", ""),
        ("42", ""),
        ("### 42", ""),
        ("", ""),
    ],
)
def test_the_final_answer(completion, expected):
    assert final_answer(completion, "####") == expected


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("#### 42", "42", 1.0),
        ("#### 42", " 42\n", 1.0),
        ("#### 7\n#### 42 ", "42", 1.0),
        ("#### 42\n#### 7", "42", 0.0),
        ("42", "42", 0.0),
        ("#### 42.0", "42", 0.0),
        ("#### 4 2", "42", 0.0),
        ("#### A", "a", 0.0),
        ("", "42", 0.0),
        ("####", "42", 0.0),
    ],
)
async def test_exact(completion, answer, reward):
    assert await grade(EXACT, completion, answer) == reward


async def test_exact_with_another_marker():
    assert await grade(ExactGrader("Answer:"), "#### 1\nAnswer: 2", "2") == 1.0


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("#### 0.5", "1/2", 1.0),
        ("#### 1/2", "0.5", 1.0),
        ("#### 70,000", "70000", 1.0),
        ("#### $18", "18", 1.0),
        ("#### 18 dollars", "18", 1.0),
        ("#### 18.0", "18", 1.0),
        (r"so \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"so \boxed{7}, not 8", "7", 1.0),
        (r"so $\sqrt{8}$", r"$2\sqrt{2}$", 1.0),
        (r"\boxed{\{1, 2, 3\}}", r"\{3, 2, 1\}", 1.0),
        (r"\boxed{\{1, 2\}}", r"\{3, 2, 1\}", 0.0),
        (r"\boxed{(2, 1)}", "$(1, 2)$", 0.0),
        ("the answer is 18", "18", 1.0),
        ("#### 1 000", "1000", 1.0),
        ("#### +3", "3", 1.0),
        ("#### 3.5", "3 1/2", 1.0),
        ("#### 3 1/2", "7/2", 1.0),
        ("#### -3 1/2", "-3.5", 1.0),
        ("#### 3/2", "3 1/2", 0.0),
        ("#### 2", "3 1/2", 0.0),
        (r"so \boxed{18 \text{ dollars}}, or so", "18", 1.0),
        (r"so \boxed{\$1,800}", "1800", 1.0),
        (r"either $\boxed{1}$ or $\boxed{2}$", r"\{1, 2\}", 1.0),
        (r"so \boxed{7}. In 2 words", "2", 0.0),
        ("#### 18\n#### 19", "18", 0.0),
        (r"\boxed{18} #### 19", "18", 0.0),
        ("#### 17", "18", 0.0),
        ("#### -3", "3", 0.0),
        ("#### 0.333", "1/3", 0.0),
        ("no idea", "18", 0.0),
        ("####", "18", 0.0),
        ("", "18", 0.0),
        (r"\boxed{", "18", 0.0),
        ("\0\ud7ff$$ \\frac{", "18", 0.0),
    ],
)
async def test_math(maths, completion, answer, reward):
    assert await grade(maths, completion, answer) == reward


@pytest.mark.parametrize(
    "answer",
    [
        *(
            r"2\sqrt{3}",
            "5x + 3",
            r"\frac{\pi}{2}",
            "6 - 5i",
            r"(-\infty, 2)",
            "x^2+1",
            r"(3, \pi)",
        ),
        *(MATRIX, r"\text{Evelyn}", r"5\sqrt{2}\text{ units}"),
    ],
)
async def test_math_takes_a_bare_latex_reference(maths, answer):
    """Answers of the MATH data set: the same formula is right, boxed and after the marker."""
    assert await grade(maths, rf"so \boxed{{{answer}}}.", answer) == 1.0
    assert await grade(maths, f"so\n#### ${answer}$", answer) == 1.0
    assert await grade(maths, f"so\n#### {answer}", answer) == 1.0


@pytest.mark.parametrize(("number", "answer"), [("5", "6 - 5i"), ("2", "2k+2"), ("2", MATRIX)])
async def test_math_does_not_take_a_number_for_a_formula(maths, number, answer):
    assert await grade(maths, rf"\boxed{{{number}}}", answer) == 0.0


async def test_a_monster_costs_two_time_limits_and_gives_0():
    pool = GradingPool(1, 2.0)
    maths = MathGrader(pool, "####")
    try:
        began = time.monotonic()
        assert await grade(maths, "#### 10^10^10^10", "3") == 0.0
        assert time.monotonic() - began < 20
        assert await grade(maths, "#### x + 3", "3 + x") == 1.0
    finally:
        pool.close()


def test_a_reference_that_is_too_long_is_refused(maths):
    maths.check("7" * 2000)
    with pytest.raises(FieldError, match="at most 2000") as caught:
        maths.check("7" * 2001)
    assert caught.value.field == "answer"


def test_unknown_graders_and_missing_answers_are_refused():
    graders = Graders({"exact": EXACT, "math": EXACT})
    assert graders.named("exact") is EXACT
    graders.check("exact", "42")
    for name in ("", "Exact", "nope"):
        with pytest.raises(FieldError, match=r"exact \| math") as caught:
            graders.check(name, "42")
        assert caught.value.field == "grader"
    for answer in ("", " \n"):
        with pytest.raises(FieldError, match="'exact' needs one") as caught:
            graders.check("exact", answer)
        assert caught.value.field == "answer"
