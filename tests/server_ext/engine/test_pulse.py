"""Work that moves, and work that only seems to."""

from __future__ import annotations

import asyncio

import pytest

from server_ext.engine import pulse as module
from server_ext.engine.pulse import Pulse


class Engine:
    """What a Pulse asks, with a switch for each way of standing still."""

    def __init__(self) -> None:
        self.progress: int | None = None
        self.held, self.tokens, self.prefills = False, 0, 0
        self.answers, self.generates = asyncio.Event(), asyncio.Event()
        self.answers.set()
        self.generates.set()
        self.pulse = Pulse(lambda: self.progress, self._passes, lambda: self.held, self._one_token)

    async def _passes(self) -> int:
        await self.answers.wait()
        return self.prefills

    async def _one_token(self) -> None:
        await self.generates.wait()
        self.tokens += 1

    async def moves(self) -> bool:
        try:
            await asyncio.wait_for(self.pulse.beat(), 0.2)
        except TimeoutError:
            return False
        return True


@pytest.fixture
async def engine(monkeypatch):
    monkeypatch.setattr(module, "_POLL_S", 0.005)
    return Engine()


async def test_an_idle_engine_generates_a_token(engine):
    assert await engine.moves() and engine.tokens == 1
    engine.generates.clear()
    assert not await engine.moves()


async def test_a_scheduler_that_does_not_answer(engine):
    engine.answers.clear()
    assert not await engine.moves()


async def test_requests_that_get_nowhere(engine):
    engine.progress = 7
    assert not await engine.moves() and engine.tokens == 0
    asyncio.get_running_loop().call_later(0.05, setattr, engine, "progress", 8)
    assert await engine.moves() and engine.tokens == 0


async def test_a_long_prompt_moves_before_its_first_token(engine):
    engine.progress = 7
    asyncio.get_running_loop().call_later(0.05, setattr, engine, "prefills", 1)
    assert await engine.moves() and engine.tokens == 0


async def test_a_request_that_only_comes_is_no_movement(engine):
    engine.answers.clear()
    asyncio.get_running_loop().call_later(0.02, setattr, engine, "progress", 1)
    asyncio.get_running_loop().call_later(0.03, engine.answers.set)
    assert not await engine.moves()


async def test_requests_stand_still_while_weights_are_switched(engine):
    engine.progress, engine.held = 7, True
    assert await engine.moves() and engine.tokens == 0
