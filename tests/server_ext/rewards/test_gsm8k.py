"""The graders on all of GSM8K's answers, each written in five ways, right and wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator

import pytest

from ibtree.messages import Submission
from server_ext.rewards.exact import ExactGrader
from server_ext.rewards.math import MathGrader
from server_ext.rewards.pool import GradingPool
from tests.data import data

COUNT = 1319

WRITINGS: dict[str, Callable[[str, int], str]] = {
    "plain": lambda work, n: f"{work}#### {n}",
    "boxed": lambda work, n: rf"{work}So we get $\boxed{{{n}}}$.",
    "units": lambda work, n: f"{work}#### ${n:,}" if n % 2 else f"{work}#### {n:,} dollars",
    "sentence": lambda work, n: f"{work}The answer is {n:,}.",
    "trailing": lambda work, n: f"{work}#### {n}\nI hope that helps, in 2 or 3 ways!",
}
CHANGES: list[Callable[[int], int]] = [
    lambda n: n + 1,
    lambda n: n - 1,
    lambda n: n * 10 if n else 7,
    lambda n: -n if n else 7,
    lambda n: n + 1000,
    lambda n: n // 10 if abs(n) > 9 else n + 5,
]


@pytest.fixture(scope="module")
def maths() -> Iterator[MathGrader]:
    pool = GradingPool(2, 60.0)
    yield MathGrader(pool, "####")
    pool.close()


def rows() -> list[tuple[str, str, str]]:
    """Question, worked solution and answer, as they stand in the data."""
    with data("gsm8k/test.jsonl").open(encoding="utf-8") as lines:
        read = [json.loads(line) for line in lines]
    parted = [(row["question"], *row["answer"].rsplit("####", 1)) for row in read]
    assert len(parted) == COUNT
    return [(question, work, answer.strip()) for question, work, answer in parted]


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("writing", WRITINGS)
async def test_math(maths, writing, right):
    submissions = []
    for at, (question, work, answer) in enumerate(rows()):
        number = int(answer.replace(",", ""))
        if not right:
            changed = CHANGES[at % len(CHANGES)](number)
            assert changed != number
            number = changed
        completion = WRITINGS[writing](work, number)
        submissions.append(Submission(question, completion, answer))
    rewards = await asyncio.gather(*(maths.grade(submission) for submission in submissions))
    wrong = [s for s, reward in zip(submissions, rewards, strict=True) if reward != float(right)]
    assert not wrong, (len(wrong), wrong[:3])


@pytest.mark.parametrize(("change", "reward"), [(0, 1.0), (1, 0.0), (-10, 0.0)])
async def test_exact_on_worked_answers(change, reward):
    grader, rewards = ExactGrader("####"), set()
    for question, work, answer in rows():
        final = str(int(answer.replace(",", "")) + change) if change else answer
        rewards.add(await grader.grade(Submission(question, f"{work}#### {final}", answer)))
    assert rewards == {reward}
