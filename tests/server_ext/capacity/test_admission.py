"""As many trees are open as the cache can hold, in the order they came."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from server_ext.capacity.admission import Admission
from server_ext.capacity.shares import Kind, shares_of

SHARES = shares_of(0.75)


async def opened(
    admission: Admission, stack: AsyncExitStack, most: int = 100, kind: Kind = Kind.QUEUED
) -> asyncio.Task:
    """A tree with a prompt of 10 tokens that waits for its reservation, or has it."""
    waiting = admission.reserve(10, most, kind)
    task = asyncio.create_task(stack.enter_async_context(waiting))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return task


async def test_no_more_than_fit():
    admission = Admission(330, SHARES)
    async with AsyncExitStack() as stack:
        trees = [await opened(admission, stack) for _ in range(4)]
        assert [tree.done() for tree in trees] == [True, True, True, False]
        admission.ended(trees[0].result(), 40)  # trees keep less than they might: 50 each
        await asyncio.wait_for(trees[3], 1)


async def test_a_tree_that_ends_makes_room():
    admission = Admission(120, SHARES)
    async with AsyncExitStack() as stack:
        async with AsyncExitStack() as first:
            await opened(admission, first)
            second = await opened(admission, stack)
            assert not second.done()
        await asyncio.wait_for(second, 1)


async def test_one_tree_is_always_let_in():
    admission = Admission(5, SHARES)
    async with AsyncExitStack() as stack:
        assert (await opened(admission, stack)).done()
        waiting = await opened(admission, stack)
        assert not waiting.done()
        waiting.cancel()


async def test_a_large_tree_is_not_overtaken():
    admission = Admission(300, SHARES)
    async with AsyncExitStack() as stack, AsyncExitStack() as first:
        await opened(admission, first)
        large = await opened(admission, stack, most=280)
        small = await opened(admission, stack, most=1)
        assert not large.done() and not small.done()
        await first.aclose()
        await asyncio.wait_for(large, 1)


async def test_one_that_gives_up_lets_the_next_in():
    admission = Admission(120, SHARES)
    async with AsyncExitStack() as stack, AsyncExitStack() as first:
        await opened(admission, first)
        waiting = await opened(admission, stack)
        behind = await opened(admission, stack)
        waiting.cancel()
        await first.aclose()
        await asyncio.wait_for(behind, 1)


async def test_no_limit():
    admission = Admission(None, SHARES)
    async with AsyncExitStack() as stack:
        assert all([(await opened(admission, stack)).done() for _ in range(100)])


@pytest.mark.parametrize("used", [0, 40])
async def test_what_trees_keep_is_learnt(used):
    admission = Admission(1000, SHARES)
    async with AsyncExitStack() as stack:
        for _ in range(50):
            async with admission.reserve(10, 100) as reservation:
                admission.ended(reservation, used)
        trees = [await opened(admission, stack) for _ in range(101)]
        assert sum(tree.done() for tree in trees) == 1000 // (10 + used)


@pytest.mark.parametrize(("kind", "within"), [(Kind.CALL, 7), (Kind.QUEUED, 2)])
async def test_no_kind_waits_for_the_other_within_its_share(kind, within):
    """The other has opened as many trees as fit, and they never end."""
    other = next(k for k in Kind if k is not kind)
    admission = Admission(1100, SHARES)
    async with AsyncExitStack() as stack:
        others = [await opened(admission, stack, kind=other) for _ in range(12)]
        assert [tree.done() for tree in others] == [True] * 10 + [False] * 2
        trees = [await opened(admission, stack, kind=kind) for _ in range(within + 1)]
        assert [tree.done() for tree in trees] == [True] * within + [False]
        assert (admission.waiting(other), admission.waiting(kind)) == (2, 1)
        for tree in (*others, *trees):
            tree.cancel()


async def test_one_of_each_kind_is_let_in_however_large():
    admission = Admission(10, SHARES)
    async with AsyncExitStack() as stack:
        assert (await opened(admission, stack, kind=Kind.QUEUED)).done()
        assert (await opened(admission, stack, kind=Kind.CALL)).done()
