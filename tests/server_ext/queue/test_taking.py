"""Who holds the queue, and who lets it go."""

from __future__ import annotations

import asyncio

from server_ext.queue.taking import Taking


async def test_prompts_are_taken_while_nobody_holds_them():
    taking = Taking()
    await asyncio.wait_for(taking.allowed(), 1)
    taking.hold("operator", "lunch")
    taking.hold("grader", "away")
    taking.hold("operator", "dinner")
    assert taking.reasons == ("operator: dinner", "grader: away")
    assert taking.held_by("grader") and not taking.held_by("stop")
    waiting = asyncio.create_task(taking.allowed())
    taking.release("operator")
    taking.release("nobody")
    await asyncio.sleep(0.01)
    assert not waiting.done()
    taking.release("grader")
    await asyncio.wait_for(waiting, 1)


async def test_held_again_before_the_waiting_one_wakes_up():
    taking = Taking()
    taking.hold("a", "1")
    waiting = asyncio.create_task(taking.allowed())
    await asyncio.sleep(0)
    taking.release("a")
    taking.hold("b", "2")
    await asyncio.sleep(0.01)
    assert not waiting.done()
    waiting.cancel()
