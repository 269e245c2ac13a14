"""A server and a learner as processes of their own, stopped whatever happens."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

MODEL = Path(__file__).parent / "model"
SAMPLING = ("--temperature=1", "--top-p=1", "--top-k=-1", "--max-new-tokens=96")
START_TIMEOUT_S, STOP_TIMEOUT_S = 180.0, 30.0
_READY = re.compile(r"serving on (\S+:\d+) \(health (\d+), web (\d+)\)")


class Ended(RuntimeError):
    """A process ended by itself, or did not come up."""


class Process:
    """A command in a session of its own: Ctrl-C in the terminal reaches only its starter."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        with log.open("ab") as file:
            self._begins = file.tell()  # those before it may have written there too
            self.popen = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def running(self) -> bool:
        return self.popen.poll() is None

    def kill(self) -> None:
        """SIGKILL to the process and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def stop(self) -> None:
        """SIGTERM to the process; at last, or at once if it takes too long, `kill`."""
        if self.running():
            self.popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(STOP_TIMEOUT_S)
        self.kill()

    def said(self) -> str:
        """All it has written."""
        return self.log.read_bytes()[self._begins :].decode(errors="replace")

    def last_words(self) -> str:
        return "\n".join(self.said().splitlines()[-15:])


class _SignalsDeferred:
    """Keeps SIGINT and SIGTERM back until the block ends, so that it happens as a whole."""

    def __enter__(self) -> None:
        self._came: list[int] = []
        self._before = {
            number: signal.signal(number, lambda came, _: self._came.append(came))
            for number in (signal.SIGINT, signal.SIGTERM)
        }

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for number in self._came[:1]:
            signal.raise_signal(number)


@contextlib.contextmanager
def _terminated_by_exit() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, through its `finally`; a handler set before stays."""
    default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if default:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        if default:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def running(line: Sequence[str], log: Path) -> Iterator[Process]:
    """Starts a command and stops it at the end, wherever Ctrl-C or SIGTERM comes."""
    process = None
    with _terminated_by_exit():
        try:
            with _SignalsDeferred():
                process = Process(line, log)
            yield process
        finally:
            with _SignalsDeferred():
                if process:
                    process.stop()


def command(name: str, *arguments: str) -> list[str]:
    """The command line of one of the project's console scripts in this environment."""
    return [str(Path(sys.executable).with_name(name)), *arguments]


def server_command(
    data_dir: Path, *arguments: str, model: Path = MODEL, port: int = 0
) -> list[str]:
    """An ibtpo-server of the arith model on the CPU."""
    return command(
        "ibtpo-server",
        f"--model={model}",
        "--device=cpu",
        "--dtype=float32",
        "--threads=1",
        f"--port={port}",
        "--health-port=0",
        "--web-port=0",
        f"--data-dir={data_dir}",
        "--grader=exact",
        "--no-supervise",  # `Process.kill` takes the whole session, which the supervisor splits
        *SAMPLING,
        *arguments,
        "--",
        "--max-total-tokens=60000",
    )


def learner_command(server: str, prompts: Path, out_dir: Path, *arguments: str) -> list[str]:
    """An ibtpo-learner of the arith model on the CPU, on-policy; of an option given twice the last
    counts."""
    return command(
        "ibtpo-learner",
        f"--server={server}",
        f"--model={MODEL}",
        f"--prompts={prompts}",
        f"--out-dir={out_dir}",
        "--device=cpu",
        "--compute-dtype=float32",
        "--grader=exact",
        "--lr=4e-4",
        "--grad-clip=0.15",
        "--prompts-ahead-steps=0",
        "--kl-weight=0",
        *SAMPLING,
        *arguments,
    )


class Addresses(NamedTuple):
    """The addresses of a server's ports, as host:port."""

    grpc: str
    health: str
    web: str


def wait_until_serving(process: Process) -> Addresses:
    """The server's addresses, once the server has generated its first token."""
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until:
        if ready := _READY.search(process.said()):
            address, health, web = ready.groups()
            host = address.rpartition(":")[0]
            return Addresses(address, f"{host}:{health}", f"{host}:{web}")
        if not process.running():
            raise Ended(f"the server ended; its last words:\n{process.last_words()}")
        time.sleep(0.1)
    raise Ended(f"the server did not start; see {process.log}")
