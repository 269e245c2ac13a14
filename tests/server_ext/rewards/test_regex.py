"""The grader `regex`: a pattern for the whole final answer, from clients nobody knows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ibtree.errors import FieldError
from ibtree.messages import Submission
from server_ext.rewards.pool import GradingPool
from server_ext.rewards.regex import RegexGrader


@pytest.fixture(scope="module")
def grader() -> Iterator[RegexGrader]:
    pool = GradingPool(1, 1.0)
    yield RegexGrader(pool, "####")
    pool.close()


@pytest.mark.parametrize(
    ("completion", "pattern", "reward"),
    [
        ("#### 42", "42", 1.0),
        ("#### 42", " [0-9]+\n", 1.0),
        ("#### 42", "4", 0.0),  # the whole answer
        ("#### 42", "4.*", 1.0),
        ("#### 41 or 42", "42", 0.0),  # naming many does not help
        ("#### 41\n#### 42", "41", 0.0),
        ("42", "42", 0.0),  # nothing is marked
        ("####", ".*", 0.0),  # no answer
        ("no answer", "x*", 0.0),
        ("#### Paris", "(?i)(city of )?paris", 1.0),
        ("#### the City of paris", "(?i)(city of )?paris", 0.0),
        ("#### 2024-05-06", r"\d{4}-\d\d-\d\d", 1.0),
        ("#### \ud800\0", r"\ud800\0", 1.0),
    ],
)
async def test_regex(grader, completion, pattern, reward):
    grader.check(pattern)
    assert await grader.grade(Submission("Q", completion, pattern)) == reward


@pytest.mark.parametrize(
    "pattern",
    ["", " \n", "(", "[a", "a{99999999999999}", "*", "(?<=a*)b", "(" * 490 + ")" * 490, "a" * 1001],
)
def test_a_bad_pattern_is_refused(grader, pattern):
    with pytest.raises(FieldError) as caught:
        grader.check(pattern)
    assert caught.value.field == "answer"


async def test_a_pattern_that_backtracks_for_ever_costs_one_time_limit(grader):
    bomb = Submission("Q", "#### " + "a" * 5000 + "!", "(a|aa)+")
    grader.check(bomb.answer)
    assert await grader.grade(bomb) == 0.0
    assert await grader.grade(Submission("Q", "#### aaa", "(a|aa)+")) == 1.0
