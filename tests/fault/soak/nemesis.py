"""What goes wrong, and how it is set right again; seeded."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from random import Random

from processes import Ended

from tests.fault.soak.coverage import Fault
from tests.fault.soak.servers import GRACE_S
from tests.fault.soak.site import ENGINE_DEATH_S, RUNS, Site
from tests.fault.soak.versions import Update

HOUR_S = 3600.0
_STOP_S = 30.0
"""A server that was told to end has ended by then, its grace over."""

Injection = Callable[["Nemesis", Update | None], AbstractAsyncContextManager[None]]


class Nemesis:
    """`async with nemesis.inject(fault, update)`: inside the fault is there, afterwards it is not.

    `ended_by` has the exit statuses of servers that ended under a fault that need not end one."""

    def __init__(self, site: Site, rng: Random) -> None:
        self.site, self.rng = site, rng
        self.ended_by: dict[str, list[int]] = {}

    @asynccontextmanager
    async def inject(self, fault: Fault, update: Update | None) -> AsyncIterator[None]:
        """`update`: the push or rollback under way, which some faults cut."""
        async with INJECTIONS[fault](self, update):
            yield
        await self.revive(fault)

    async def revive(self, fault: Fault | None) -> None:
        """Starts a server again that ended by itself, as a supervisor would; `fault`: the last."""
        status = await self.site.server_ended(0.0)
        if status is not None:
            self.ended_by.setdefault(str(fault), []).append(status)
            await self.site.start_server()

    async def _hold(self, low_s: float, high_s: float) -> None:
        await asyncio.sleep(self.rng.uniform(low_s, high_s))

    @asynccontextmanager
    async def server_killed(self, _: Update | None) -> AsyncIterator[None]:
        assert self.site.server
        self.site.server.kill()
        yield
        await self._restarted(0.0)

    @asynccontextmanager
    async def server_terminated(self, _: Update | None) -> AsyncIterator[None]:
        self.site.signal_server(signal.SIGTERM)
        yield
        await self._restarted(GRACE_S + _STOP_S)

    @asynccontextmanager
    async def engine_killed(self, _: Update | None) -> AsyncIterator[None]:
        self.site.signal_scheduler(signal.SIGKILL)
        yield
        await self._restarted(ENGINE_DEATH_S)

    async def _restarted(self, patience_s: float) -> None:
        """Raises Ended for a server that does not end in time."""
        if await self.site.server_ended(patience_s) is None:
            assert self.site.server
            self.site.server.kill()
            raise Ended(f"the server did not end within {patience_s:g} s")
        # the next life switches weights in the other way: each has states that last longer
        self.site.weight_switch = self.rng.choice(["interrupt", "drain"])
        await self.site.start_server()

    @asynccontextmanager
    async def server_stopped(self, _: Update | None) -> AsyncIterator[None]:
        self.site.signal_server(signal.SIGSTOP)
        yield
        await self._hold(0.5, 4.0)
        self.site.signal_server(signal.SIGCONT)

    @asynccontextmanager
    async def scheduler_stopped(self, _: Update | None) -> AsyncIterator[None]:
        self.site.signal_scheduler(signal.SIGSTOP)
        yield
        await self._hold(0.5, 4.0)
        self.site.signal_scheduler(signal.SIGCONT)

    @asynccontextmanager
    async def connections_reset(self, _: Update | None) -> AsyncIterator[None]:
        await self.site.proxy.reset()
        yield
        for _again in range(self.rng.randrange(3)):
            await self._hold(0.0, 1.0)
            await self.site.proxy.reset()

    @asynccontextmanager
    async def connections_half_open(self, _: Update | None) -> AsyncIterator[None]:
        self.site.proxy.halt()
        yield
        await self._hold(0.5, 6.0)
        if self.rng.random() < 0.5:  # else the bytes arrive after all
            await self.site.proxy.reset()
        self.site.proxy.resume()

    @asynccontextmanager
    async def latency(self, _: Update | None) -> AsyncIterator[None]:
        self.site.proxy.latency_s = self.rng.uniform(0.05, 0.5)
        yield
        await self._hold(1.0, 4.0)
        self.site.proxy.latency_s = 0.0

    @asynccontextmanager
    async def disk_full(self, _: Update | None) -> AsyncIterator[None]:
        self.site.disk.fill()
        yield
        await self._hold(0.5, 4.0)
        self.site.disk.free()

    @asynccontextmanager
    async def clock_step(self, _: Update | None) -> AsyncIterator[None]:
        shift_s = self.site.control.clock_shift_s
        step_s = self.rng.choice([60.0, HOUR_S, 24 * HOUR_S]) * self.rng.choice([-1, 1])
        # never further than two days away: the steps are what is tried, not the year
        self.site.control.shift_clock(step_s if abs(shift_s + step_s) < 48 * HOUR_S else -step_s)
        yield
        await self._hold(0.5, 2.0)

    @asynccontextmanager
    async def grader_killed(self, _: Update | None) -> AsyncIterator[None]:
        assert self.site.rewards
        self.site.rewards.kill()
        yield
        await self._hold(0.5, 7.0)
        await self.site.start_rewards()

    @asynccontextmanager
    async def grader_stopped(self, _: Update | None) -> AsyncIterator[None]:
        assert self.site.rewards
        self.site.rewards.popen.send_signal(signal.SIGSTOP)
        yield
        await self._hold(0.5, 7.0)
        self.site.rewards.popen.send_signal(signal.SIGCONT)

    @asynccontextmanager
    async def learner_killed(self, _: Update | None) -> AsyncIterator[None]:
        killed = [run for run in RUNS if self.rng.random() < 0.7] or [RUNS[0]]
        for run in killed:
            self.site.learners[run].kill()
        yield
        await self._hold(0.0, 2.0)
        for run in killed:
            self.site.start_learner(run)

    @asynccontextmanager
    async def call_cut(self, update: Update | None) -> AsyncIterator[None]:
        if update:
            update.cut()
        yield


INJECTIONS: dict[Fault, Injection] = {
    Fault.SERVER_KILLED: Nemesis.server_killed,
    Fault.SERVER_STOPPED: Nemesis.server_stopped,
    Fault.SERVER_TERMINATED: Nemesis.server_terminated,
    Fault.SCHEDULER_STOPPED: Nemesis.scheduler_stopped,
    Fault.ENGINE_KILLED: Nemesis.engine_killed,
    Fault.CONNECTIONS_RESET: Nemesis.connections_reset,
    Fault.CONNECTIONS_HALF_OPEN: Nemesis.connections_half_open,
    Fault.LATENCY: Nemesis.latency,
    Fault.DISK_FULL: Nemesis.disk_full,
    Fault.CLOCK_STEP: Nemesis.clock_step,
    Fault.GRADER_KILLED: Nemesis.grader_killed,
    Fault.GRADER_STOPPED: Nemesis.grader_stopped,
    Fault.LEARNER_KILLED: Nemesis.learner_killed,
    Fault.PUSH_CUT: Nemesis.call_cut,
    Fault.ROLLBACK_CUT: Nemesis.call_cut,
}
