"""Signals, and what they stop.

starting ── signal ──▶ the process ends, and with it what it had started
serving ── first signal ──▶ draining ── all ended, grace over, or second signal ──▶ stopped
a third signal ends the process where it stands: what is worth keeping is on the disk
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from typing import Any, NoReturn

import grpc

from server_ext.queue.producer import Producer
from server_ext.services.health import Health
from server_ext.services.sampling import SamplingService

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_log = logging.getLogger(__name__)


class Signals:
    """What signals have asked for: to stop (`asked`), and not to wait for anything (`at_once`)."""

    def __init__(self) -> None:
        self.asked, self.at_once = asyncio.Event(), asyncio.Event()

    def exit_on_signal(self) -> None:
        """While the server starts: a signal unwinds what was started. Again after SGLang's first
        request, with which it takes the signals for itself."""

        def leave(number: int, _: Any) -> NoReturn:
            sys.exit(128 + number)

        for number in SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, leave)

    def take(self) -> None:
        """The server serves: from now on signals are answered here."""
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._came)

    def _came(self) -> None:
        if not self.asked.is_set():
            self.asked.set()
            return
        _log.warning("a second signal: what still grows is given up")
        self.at_once.set()
        for number in SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)


async def drain(
    server: grpc.aio.Server,
    health: Health,
    producer: Producer,
    sampling: SamplingService,
    grace_s: float,
    at_once: asyncio.Event,
) -> None:
    """Stops taking; then what has begun may end, until the grace is over or `at_once` is set.
    Afterwards no call is under way and no tree grows."""
    health.serving(False)
    sampling.stop_taking()
    ends = {
        asyncio.ensure_future(producer.drain(grace_s)),
        asyncio.ensure_future(server.stop(grace_s)),
    }
    hurry = asyncio.ensure_future(at_once.wait())
    try:
        while not hurry.done() and not all(end.done() for end in ends):
            pending = [task for task in (*ends, hurry) if not task.done()]
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    finally:
        hurry.cancel()
    if at_once.is_set():
        await producer.give_up()
        await server.stop(0)  # the shorter grace counts
    for end in ends:
        await end
