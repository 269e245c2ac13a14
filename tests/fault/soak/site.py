"""The processes of a soak: the server, its reward service, the learners, and the proxy between."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

import psutil
from processes import Ended, Process, wait_until_serving

from tests.fault.soak.control import Control
from tests.fault.soak.coverage import Fault
from tests.fault.soak.disk import SmallDisk
from tests.fault.soak.events import EventLog, Kind
from tests.fault.soak.proxy import FaultyProxy
from tests.fault.soak.reward_service import READY
from tests.fault.soak.servers import Server, module
from tests.fault.soak.trainer import DRAIN, ledger_path

RUNS = ("a", "b")
DISK_BYTES = 128 * 1024**2
ENGINE_DEATH_S = 30.0
"""SGLang ends a server whose scheduler is dead well within this."""
_STATE = re.compile(rb"weight version \d+: (\w+)")
_REWARDS = re.compile(rf"{READY} on (\S+)")


class Site:
    """`async with Site(folder)`: everything runs, and is stopped at the end."""

    def __init__(self, folder: Path, kind: Server) -> None:
        self.folder, self.kind = folder, kind
        self.weight_switch = "interrupt"
        """How the server's next life switches weights."""
        self.log = EventLog(folder / "events.jsonl")
        self.control = Control(folder / "control")
        self.disk = SmallDisk(folder / "disk", DISK_BYTES)
        self.proxy = FaultyProxy()
        self.server: Process | None = None
        self.rewards: Process | None = None
        self.learners: dict[str, Process] = {}
        self.address = self._reward_address = ""
        self.starts = 0
        self._states: _States | None = None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.enter_context(self.disk)
            stack.callback(self._stop)
            await self.start_rewards()
            await self.start_server()
            await stack.enter_async_context(self.proxy)
            self.proxy.target = self.address
            for run in RUNS:
                self.start_learner(run)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def _stop(self) -> None:
        for process in (*self.learners.values(), self.server, self.rewards):
            if process:
                process.kill()

    # ---- the server

    @property
    def data_dir(self) -> Path:
        return self.disk.path / "data"

    @property
    def faults_left_out(self) -> dict[Fault, str]:
        """Faults that this machine or this server cannot have, and why; once the site is up."""
        problem = self.disk.problem
        no_disk = {Fault.DISK_FULL: f"no tmpfs can be mounted: {problem}"} if problem else {}
        return self.kind.left_out | no_disk

    async def start_server(self) -> None:
        """Starts it, on the port it had before, and returns when it serves. Raises Ended."""
        port = int(self.address.rpartition(":")[2] or 0)
        data, rewards = self.data_dir, self._reward_address
        command = self.kind.command(data, rewards, port, self.weight_switch)
        ours = [f"{name}={value}" for name, value in self.control.environment().items()]
        self.starts += 1
        log = self.folder / f"server-{self.starts}.log"
        self.server, self._states = Process(["env", *ours, *command], log), _States(log)
        self.address = (await asyncio.to_thread(wait_until_serving, self.server)).grpc
        self.log.write(Kind.STARTED)

    async def server_ended(self, timeout_s: float) -> int | None:
        """Its exit status, once it has ended and all it started is gone; None: it has not."""
        assert self.server
        until = asyncio.get_running_loop().time() + timeout_s
        while self.server.running():
            if asyncio.get_running_loop().time() > until:
                return None
            await asyncio.sleep(0.05)
        status = self.server.popen.returncode
        self.server.kill()  # what it left behind
        self.log.write(Kind.DIED, status=status)
        return int(status)

    def signal_server(self, number: signal.Signals) -> None:
        assert self.server
        self.server.popen.send_signal(number)

    def signal_scheduler(self, number: signal.Signals) -> None:
        """Raises Ended if there is none."""
        assert self.server
        try:
            below = psutil.Process(self.server.popen.pid).children(recursive=True)
        except psutil.NoSuchProcess as error:
            raise Ended("the server is gone") from error
        pids = [one.pid for one in below if _named(one).startswith("sglang::scheduler")]
        if not pids:
            raise Ended("the server has no scheduler")
        for pid in pids:
            os.kill(pid, number)

    def logged_state(self) -> str:
        """State of the newest weight version, from the server's own log: exact to the moment, also
        of a server that was just killed. Empty: this life's log tells of none."""
        assert self._states
        return self._states.newest()

    # ---- the others

    async def start_rewards(self) -> None:
        """Starts the reward service, on the port it had before, and returns when it answers."""
        port = self._reward_address.rpartition(":")[2] or "0"
        self.rewards = Process(module("reward_service", port), self.folder / "rewards.log")
        while not (found := _REWARDS.search(self.rewards.said())):
            if not self.rewards.running():
                raise Ended(self.rewards.last_words())
            await asyncio.sleep(0.05)
        self._reward_address = found[1]

    def start_learner(self, run: str) -> None:
        command = module("trainer", self.proxy.address, run, str(self.folder))
        self.learners[run] = Process(command, self.folder / f"learner-{run}.log")

    def check_learners(self) -> None:
        """Raises Ended if one ended by itself."""
        for process in self.learners.values():
            if not process.running():
                raise Ended(process.last_words())

    def stop_learners(self) -> None:
        for process in self.learners.values():
            process.kill()

    def drain(self) -> None:
        """From now on learners submit nothing, and train on what there is."""
        (self.folder / DRAIN).touch()

    def event_files(self) -> list[Path]:
        """Those that are there."""
        files = [self.folder / "events.jsonl", *(ledger_path(self.folder, run) for run in RUNS)]
        return [path for path in files if path.exists()]


def _named(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return ""


class _States:
    """Follows the states of weight versions in the log of one life of the server."""

    def __init__(self, log: Path) -> None:
        self._file = log.open("rb")
        self._rest, self._newest = b"", ""

    def newest(self) -> str:
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        for line in lines:
            if found := _STATE.search(line):
                self._newest = found[1].decode()
        return self._newest
