"""Graders fed anything: never an exception, always a reward in [0, 1], and the pool lives on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ibtree.errors import FieldError
from ibtree.messages import Submission
from server_ext.rewards.base import Grader
from server_ext.rewards.exact import ExactGrader
from server_ext.rewards.math import MathGrader
from server_ext.rewards.pool import GradingPool
from server_ext.rewards.regex import RegexGrader
from server_ext.rewards.self_consistency import SelfConsistencyGrader

VOTES = SelfConsistencyGrader("####")
MEGABYTE = 1_000_000

BOMBS = {
    "empty": "",
    "NUL": "\0" * 50 + "#### \0",
    "lone surrogates": "\ud800\udfff #### \udc00",
    "nan": "#### nan",
    "inf": r"\boxed{\infty - \infty} #### inf",
    "zero division": r"\boxed{\frac{0}{0}}",
    "a megabyte of x": "x" * MEGABYTE,
    "a megabyte of digits": "7" * MEGABYTE,
    "a megabyte of marked digits": "#### " + "7" * MEGABYTE,
    "a megabyte of markers": "#" * MEGABYTE,
    "a megabyte of boxes": r"\boxed{" * (MEGABYTE // 7),
    "a megabyte of dollars": "$" * MEGABYTE,
    "a megabyte of numbers": "1,2 " * (MEGABYTE // 4),
    "a megabyte of backslashes": "\\" * MEGABYTE,
    "nested fractions": r"\boxed{" + r"\frac{" * 400 + "1" + "}{2}" * 400 + "}",
    "open fractions": "#### " + r"\frac{" * 500,
    "deep braces": "#### " + "{" * 900 + "1" + "}" * 900,
    "a tower": "#### 9^{9^{9^{9^9}}}",
    "a factorial": r"#### 999999!!",
    "a sum": r"\boxed{\sum_{n=1}^{10^{12}} \frac{1}{n^n}}",
    "a huge integer": "#### " + "9" * 5000,
    "a tiny fraction": "#### 0." + "0" * 5000 + "1",
    "many decimals": "#### 3." + "14159" * 3000,
    "spaces": "#### " + " " * 100_000 + "8",
    "control characters": "".join(map(chr, range(32))) + "#### \x1b[2J",
    "right to left": "#### \u202e\u0667",
}


GOOD = [
    Submission("Q", r"so \boxed{\frac{1}{2}}", "0.5"),
    Submission("Q", "#### x + 1", "1 + x"),
    Submission("Q", "so it is 7 dollars", "7"),
]


class All(NamedTuple):
    pool: GradingPool
    graders: dict[str, Grader]

    async def grade(self, submission: Submission) -> list[float]:
        VOTES.vote(submission)
        grades = (grader.grade(submission) for grader in self.graders.values())
        rewards = await asyncio.gather(*grades)
        assert all(type(r) is float and 0.0 <= r <= 1.0 for r in rewards)
        return rewards

    async def among_good_ones(self, bombs: list[Submission]) -> list[list[float]]:
        """Rewards of the bombs; the good ones between them must get what they deserve."""
        mixed = [
            submission
            for at, bomb in enumerate(bombs)
            for submission in (bomb, GOOD[at % len(GOOD)])
        ]
        rewards = await asyncio.gather(*(self.grade(submission) for submission in mixed))
        assert [math for _, math, _ in rewards[1::2]] == [1.0] * len(bombs)
        return rewards[::2]


@pytest.fixture(scope="module")
def every() -> Iterator[All]:
    pool = GradingPool(2, 1.0)
    graders = {
        "exact": ExactGrader("####"),
        "math": MathGrader(pool, "####"),
        "regex": RegexGrader(pool, "####"),
    }
    yield All(pool, graders)
    pool.close()


async def test_completions_that_are_bombs(every):
    submissions = [Submission("Q", text, r"\frac{7}{2}") for text in BOMBS.values()]
    rewards = await every.among_good_ones(submissions)
    assert dict(zip(BOMBS, rewards, strict=True)) == dict.fromkeys(BOMBS, [0.0] * 3)


async def test_references_that_are_bombs(every):
    """Those that `math` does not refuse at the door."""
    submissions = []
    for text in BOMBS.values():
        answer = text.removeprefix("#### ")
        with suppress(FieldError):
            every.graders["math"].check(answer)
            submissions.append(Submission("Q", r"#### \frac{7}{2}", answer))
    assert len(submissions) > 8
    for exact, math, _ in await every.among_good_ones(submissions):
        assert (exact, math) == (0.0, 0.0)


PIECES = [
    *("#### ", r"\boxed{", "}", "{", "$", "\\", r"\frac{1}{2}", "^", "_", "(", ")", "[", "]"),
    *("1", "23", ",", ".", "-", "/", "=", "x", "answer", "\n", "\0", "\ud800", "%", "nan", "oo"),
]
TEXTS = st.one_of(
    st.text(st.characters(), max_size=60),
    st.lists(st.sampled_from(PIECES), max_size=16).map("".join),
)


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(completion=TEXTS, answer=TEXTS)
def test_any_text(every, completion, answer):
    asyncio.run(every.grade(Submission("Q", completion, answer)))
