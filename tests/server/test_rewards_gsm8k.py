"""The graders on GSM8K's worked answers: all right as they are, all wrong with another number."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from server_ext.rewards.base import Submission
from server_ext.rewards.exact import ExactGrader
from server_ext.rewards.math import MathGrader

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("IBTPO_TEST_DATA", ROOT / "../shared/data")) / "gsm8k/test.jsonl"
COUNT = 200

pytestmark = pytest.mark.skipif(not DATA.is_file(), reason=f"{DATA} is absent: IBTPO_TEST_DATA")


@pytest.fixture(scope="module")
def maths() -> Iterator[MathGrader]:
    grader = MathGrader(1, 60.0, "####")
    yield grader
    grader.close()


def submissions(change: int) -> list[Submission]:
    """Worked answers whose final number is raised by `change`."""
    found = []
    with DATA.open(encoding="utf-8") as lines:
        for line, _ in zip(lines, range(COUNT), strict=False):
            row = json.loads(line)
            work, answer = row["answer"].rsplit("####", 1)
            final = answer.strip()
            if change:
                final = str(int(final.replace(",", "")) + change)
            found.append(Submission(row["question"], f"{work}#### {final}", answer.strip()))
    assert len(found) == COUNT
    return found


@pytest.mark.parametrize(("change", "reward"), [(0, 1.0), (1, 0.0), (-10, 0.0)])
async def test_worked_answers(maths, change, reward):
    for grader in (ExactGrader("####"), maths):
        rewards = await asyncio.gather(*(grader.grade(one) for one in submissions(change)))
        assert set(rewards) == {reward}
