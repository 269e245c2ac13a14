"""The supervisor: its decisions, and real processes that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server_ext.supervisor import CRASHED, Course, Event, Phase
from tests import ROOT


def lives(course: Course, *deaths: tuple[int, float | None]) -> list[float]:
    """Pauses after these lives: (exit status, seconds it served or None if it never did)."""
    pauses = []
    for status, served_s in deaths:
        assert course.phase is Phase.STARTING
        if served_s is not None:
            course.on(Event.SERVES)
        course.on(Event.DIED, status, served_s or 0.0)
        if course.phase is not Phase.PAUSING:
            break
        pauses.append(course.pause_s)
        course.on(Event.PAUSED)
    return pauses


def test_pauses_grow_until_a_life_was_steady():
    course = Course()
    assert lives(course, *[(137, 5.0)] * 8) == [1, 2, 4, 8, 16, 32, 60, 60]
    assert lives(course, (137, 61.0), (137, 0.1)) == [1, 2]


def test_given_up_after_five_starts_that_never_served():
    course = Course()
    assert lives(course, *[(CRASHED, None)] * 9) == [1, 2, 4, 8]
    assert course.phase is Phase.ENDED and course.status == CRASHED
    course = Course()
    assert len(lives(course, *[(CRASHED, None)] * 4, (CRASHED, 0.1), *[(CRASHED, None)] * 9)) == 9


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_server_that_ended_or_refused_is_not_started_again(status):
    course = Course()
    assert lives(course, (status, None)) == []
    assert (course.phase, course.status) == (Phase.ENDED, status)


@pytest.mark.parametrize("serves", [False, True])
def test_told_to_stop(serves):
    course = Course()
    if serves:
        course.on(Event.SERVES)
    course.on(Event.TOLD)
    course.on(Event.SERVES)
    course.on(Event.TOLD)
    assert course.phase is Phase.STOPPING
    course.on(Event.DIED, 143)
    assert (course.phase, course.status) == (Phase.ENDED, 143)


def test_told_to_stop_between_two_lives():
    course = Course()
    course.on(Event.DIED, 137)
    course.on(Event.TOLD)
    assert (course.phase, course.status) == (Phase.ENDED, 137)


# ---- processes

PROGRAM = """
import os, pathlib, signal, subprocess, sys, time
from server_ext import supervisor

supervisor._FIRST_PAUSE_S = 0.05
supervisor.supervise()
folder, how = pathlib.Path(sys.argv[1]), sys.argv[2]
lives = folder / "lives"
with lives.open("a") as file:
    print(os.getpid(), file=file)
count = len(lives.read_text().split())
if how == "leaves":  # an engine's process that outlives it
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (folder / "left").write_text(str(left.pid))
if how == "refuses":
    sys.exit("no such model")
if how == "never":
    sys.exit(supervisor.CRASHED)
if how in ("once", "leaves") and count > 1:
    sys.exit(0)
if how == "stubborn":
    signal.signal(signal.SIGTERM, lambda *_: (folder / "told").open("a").write("x"))
supervisor.serving()
(folder / "serves").touch()
if how in ("once", "leaves"):
    os.kill(os.getpid(), signal.SIGKILL)
while True:
    time.sleep(0.01)
    if (folder / "told").exists() and (folder / "told").read_text() == "xx":
        sys.exit(7)
"""


class Run:
    def __init__(self, folder: Path, how: str) -> None:
        self.folder = folder
        self.popen = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder), how],
            cwd=ROOT, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def lives(self) -> list[int]:
        path = self.folder / "lives"
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []

    def ends(self) -> tuple[int, str]:
        _, said = self.popen.communicate(timeout=20)
        return self.popen.returncode, said

    def serves(self) -> None:
        wait_for((self.folder / "serves").exists)


def wait_for(condition, timeout_s: float = 10.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def start(tmp_path):
    runs: list[Run] = []

    def begin(how: str) -> Run:
        runs.append(Run(tmp_path, how))
        return runs[-1]

    yield begin
    for run in runs:
        run.popen.kill()
        run.popen.wait()


def test_a_killed_server_lives_again(start):
    run = start("once")
    status, said = run.ends()
    assert status == 0 and len(set(run.lives())) == 2
    assert "signal SIGKILL" in said and "started again" in said


def test_a_refused_setting_is_passed_through(start):
    status, said = start("refuses").ends()
    assert (status, said) == (1, "no such model\n")


def test_it_gives_up(start):
    run = start("never")
    status, said = run.ends()
    assert status == CRASHED and len(run.lives()) == 5
    last = said.strip().splitlines()[-1]
    assert "5 times in a row before it served" in last and "--no-supervise" in last


def test_each_signal_is_passed_on(start):
    run = start("stubborn")
    run.serves()
    run.popen.terminate()
    wait_for(
        lambda: (run.folder / "told").read_text() == "x" if (run.folder / "told").exists() else 0
    )
    assert run.popen.poll() is None
    run.popen.terminate()
    assert run.ends()[0] == 7


def test_a_server_dies_with_its_supervisor(start):
    run = start("stays")
    run.serves()
    run.popen.kill()
    run.popen.wait()
    (child,) = run.lives()
    wait_for(lambda: not alive(child))


def test_nothing_of_a_dead_server_is_left(start):
    run = start("leaves")
    assert run.ends()[0] == 0
    left = int((run.folder / "left").read_text())
    wait_for(lambda: not alive(left))


def test_told_before_it_serves(start):
    run = start("never_there")
    wait_for(run.lives)
    run.popen.send_signal(signal.SIGINT)
    assert run.ends()[0] == 130 or run.popen.returncode == 1
