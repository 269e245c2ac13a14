"""Starts a dead server again, on a machine where nothing else does.

          ┌──────── the pause is over ─────────┐
          ▼                                    │
      STARTING ──── it serves ────▶ SERVING    │
          │ dies                       │ dies  │
          └───────────▶ PAUSING ◀──────┘ ──────┘
   a signal, in any of them ─▶ STOPPING (passed on to the server) ─▶ ENDED, with its status
   it refused its settings, or died _MOST_DEATHS times in a row before it served ─▶ ENDED

SGLang answers a dead scheduler by killing the whole server, so dying is the usual way out of a
broken state: what is worth keeping is in the journal and the weight store. The server is a fork of
this process, which has imported nothing heavy yet, in a session of its own: a Ctrl-C reaches it
once, through here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from enum import Enum

REFUSED = (1, 2)
"""Exit statuses of a server that names what is wrong with its settings: again would not help."""
CRASHED = os.EX_SOFTWARE
"""Exit status of a server that ended by a fault of its own, or of the engine's."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_STEADY_S = 60.0
"""After a life that served so long the pause is the first one again."""
_MOST_DEATHS = 5
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Phase(Enum):
    """Where the server stands; see the drawing above."""

    STARTING = "starting"
    SERVING = "serving"
    PAUSING = "pausing"
    STOPPING = "stopping"
    ENDED = "ended"


class Event(Enum):
    """What moves it on."""

    SERVES = "serves"
    DIED = "died"
    PAUSED = "paused"
    TOLD = "told"


@dataclass
class Course:
    """The supervisor's decisions, without processes or clocks."""

    phase: Phase = Phase.STARTING
    pause_s: float = 0.0
    """How long PAUSING lasts."""
    deaths: int = 0
    """Lives in a row that never served."""
    status: int = 0
    """The exit status to end with."""

    def on(self, event: Event, status: int = 0, served_s: float = 0.0) -> None:
        """One transition. Of DIED: the exit status (128 + n for signal n), and for how long it had
        served [s]."""
        match self.phase, event:
            case Phase.STARTING, Event.SERVES:
                self.phase, self.deaths = Phase.SERVING, 0
            case Phase.PAUSING, Event.PAUSED:
                self.phase = Phase.STARTING
            case Phase.PAUSING, Event.TOLD:
                self.phase = Phase.ENDED
            case ((Phase.STARTING | Phase.SERVING | Phase.STOPPING), Event.TOLD):
                self.phase = Phase.STOPPING
            case Phase.STOPPING, Event.DIED:
                self.phase, self.status = Phase.ENDED, status
            case ((Phase.STARTING | Phase.SERVING), Event.DIED):
                self._died(status, served_s)
            case _:
                pass  # it says that it serves while it is stopped, and the like

    def _died(self, status: int, served_s: float) -> None:
        self.status = status
        self.deaths += self.phase is Phase.STARTING
        if status == 0 or status in REFUSED or self.deaths >= _MOST_DEATHS:
            self.phase = Phase.ENDED
            return
        longer = min(max(2 * self.pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
        self.pause_s = _FIRST_PAUSE_S if served_s >= _STEADY_S else longer
        self.phase = Phase.PAUSING


_tells: list[int] = []
"""In a supervised server, until it serves: where it says so."""


def supervise() -> None:
    """Returns in a child, which is to run the server and to call `serving` once it serves. In the
    calling process it never returns: that exits with the server's status."""
    _Supervisor().run()


def serving() -> None:
    """Tells the supervisor, if there is one, that this server serves."""
    while _tells:
        pipe = _tells.pop()
        with contextlib.suppress(BrokenPipeError):
            os.write(pipe, b"1")
        os.close(pipe)


class _Supervisor:
    def __init__(self) -> None:
        self._course = Course()
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._told: list[int] = []
        self._child = 0
        self._ready = -1
        self._served_since: float | None = None

    def run(self) -> None:
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda number, _: self._told.append(number))
        signal.signal(signal.SIGCHLD, lambda *_: None)  # wakes the wait below
        while self._course.phase is not Phase.ENDED:
            if self._course.phase is Phase.PAUSING:
                self._pause()
            elif self._is_child():
                return
            else:
                self._watch()
        sys.exit(self._course.status)

    def _is_child(self) -> bool:
        """Forks, and says on which side it returns."""
        reads, writes = os.pipe()
        supervisor = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child:
            os.close(writes)
            self._child, self._ready, self._served_since = child, reads, None
            return False
        os.close(reads)
        signal.set_wakeup_fd(-1)
        self._woken.close()
        self._waker.close()
        for number in (*_SIGNALS, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        _die_with(supervisor)
        _tells.append(writes)
        return True

    def _watch(self) -> None:
        """Returns when the server is dead and the course is decided."""
        while True:
            self._wait(None)
            self._pass_on()
            while True:
                with contextlib.suppress(ChildProcessError):
                    dead, state = os.waitpid(-1, os.WNOHANG)
                    if dead == self._child:
                        return self._is_dead(state)
                    if dead:
                        continue  # an orphan: as process 1 of a container all are ours
                break

    def _is_dead(self, state: int) -> None:
        os.close(self._ready)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child, signal.SIGKILL)  # what SGLang left behind keeps a core busy
        code = os.waitstatus_to_exitcode(state)
        served_s = 0.0 if self._served_since is None else time.monotonic() - self._served_since
        course = self._course
        course.on(Event.DIED, 128 - code if code < 0 else code, served_s)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        if course.phase is Phase.PAUSING:
            _say(f"the server ended ({how}); it is started again in {course.pause_s:g} s")
        elif course.deaths >= _MOST_DEATHS:
            _say(
                f"the server ended {course.deaths} times in a row before it served (at last: "
                f"{how}); given up. What it wrote above says why; --no-supervise starts it once"
            )

    def _pause(self) -> None:
        until = time.monotonic() + self._course.pause_s
        while not self._told and (left_s := until - time.monotonic()) > 0:
            self._wait(left_s)
        told, self._told = bool(self._told), []
        self._course.on(Event.TOLD if told else Event.PAUSED)

    def _pass_on(self) -> None:
        """Gives the child the signals that came."""
        told, self._told = self._told, []
        for number in told:
            self._course.on(Event.TOLD)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGTERM if number == signal.SIGHUP else number)

    def _wait(self, timeout_s: float | None) -> None:
        """Until a signal comes, the server says that it serves, or the time is over."""
        watched = [self._woken.fileno()]
        if self._course.phase is Phase.STARTING:
            watched.append(self._ready)
        ready, _, _ = select.select(watched, [], [], timeout_s)
        if self._woken.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                self._woken.recv(4096)
        if self._ready in ready:
            if os.read(self._ready, 1):
                self._served_since = time.monotonic()
                self._course.on(Event.SERVES)
            else:  # it is dying
                time.sleep(0.01)


def _die_with(parent: int) -> None:
    """The calling process is killed when its parent is: two servers on one folder would be in each
    other's way. On Linux; elsewhere it lives on."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(CRASHED)


def _say(what: str) -> None:
    print(f"ibtpo-server: {what}", file=sys.stderr, flush=True)
