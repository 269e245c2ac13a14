"""The grading processes: what hangs or crashes costs its own grade and one time limit."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator

import pytest

from server_ext.errors import GraderUnavailableError
from server_ext.rewards.pool import GradingPool, Zero
from tests.server_ext.rewards.grading import library_is_loaded, misbehaving, own_pid, wrong_once

WRONG = ["die", "leave", "raise", "recurse", "nan", "words", "two", "negative"]


@pytest.fixture(scope="module")
def pool() -> Iterator[GradingPool]:
    """One process, so that every grade meets what those before it left behind."""
    pool = GradingPool(1, 0.5)
    yield pool
    pool.close()


async def grade(pool: GradingPool, how: str) -> float:
    return await pool.grade("test", misbehaving, how, "7", "7")


async def test_a_grade_that_hangs_gives_0_and_the_pool_goes_on(pool):
    assert await grade(pool, "right") == 1.0  # the process is up
    began = time.monotonic()
    assert await grade(pool, "hang") == 0.0
    assert time.monotonic() - began >= 0.5
    assert await grade(pool, "right") == 1.0


@pytest.mark.parametrize("how", WRONG)
async def test_a_grade_that_goes_wrong_gives_0_with_a_warning(pool, how, caplog):
    for _ in range(2):
        assert await grade(pool, how) == 0.0
        assert await grade(pool, "right") == 1.0
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert all("test: " in record.message for record in caplog.records)


async def test_hung_and_dying_grades_between_others(pool):
    ways = ["right", "die", "hang", "raise", "right", "die", "nan", "right"]
    rewards = await asyncio.gather(*(grade(pool, how) for how in ways))
    assert rewards == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("how", ["hang", "die"])
async def test_what_goes_wrong_once_is_graded_once_more(how, tmp_path):
    """The machine was busy, or somebody killed the process: the text is not to blame."""
    zeroed: list[Zero] = []
    pool = GradingPool(1, 0.5, zeroed.append)
    try:
        assert await pool.grade("test", wrong_once, how, str(tmp_path / "met")) == 1.0
        assert zeroed == []
    finally:
        pool.close()


async def test_what_counts_as_0_is_counted_by_its_cause():
    zeroed: list[Zero] = []
    pool = GradingPool(1, 0.5, zeroed.append)
    try:
        for how in ("hang", "die", "raise", "nan", "right"):
            await grade(pool, how)
        assert zeroed == [Zero.TIMEOUT, Zero.DIED, Zero.RAISED, Zero.NO_REWARD]
    finally:
        pool.close()


@pytest.mark.parametrize("how", ["refused", "wrapped"])
async def test_what_a_grader_needs_and_is_away_is_no_0(pool, how):
    """A ConnectionError, and a client's own error that one caused."""
    with pytest.raises(GraderUnavailableError, match="test: "):
        await grade(pool, how)
    assert await grade(pool, "right") == 1.0


async def test_an_error_after_one_that_was_handled_is_the_texts(pool):
    assert await grade(pool, "handled") == 0.0


async def test_a_cancelled_grade_frees_its_process(pool):
    task = asyncio.create_task(grade(pool, "hang"))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.wait_for(grade(pool, "right"), 10) == 1.0


async def test_the_import_of_the_library_is_not_in_the_time_limit(pool):
    """A process loads it before its first grade, also one that replaces a killed process."""
    assert await pool.grade("test", library_is_loaded) == 1.0
    await grade(pool, "die")
    assert await pool.grade("test", library_is_loaded) == 1.0


async def test_a_process_killed_between_grades_is_replaced(pool):
    """pebble gives up the whole pool when a process dies while none grades."""
    pid = round(await pool.grade("test", own_pid) * 2**32)
    os.kill(pid, signal.SIGKILL)
    assert await grade(pool, "right") == 1.0
    before = pool._many.pool()
    other = round(await pool.grade("test", own_pid) * 2**32)
    os.kill(other, signal.SIGKILL)
    while before.active:  # until pebble has noticed
        await asyncio.sleep(0.01)
    rewards = await asyncio.gather(*(grade(pool, "right") for _ in range(4)))
    assert rewards == [1.0] * 4 and pool._many.pool() is not before
