"""SIGKILL at random moments: no tree lost, none trained twice, one whole version served.

IBTPO_SOAK=1 (`make soak`) kills many more times.
"""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from processes import Process

from ibtree import Client
from tests.engine import Server
from tests.loop.learning import learner_command, rows, write_prompts
from tests.loop.test_engine import prompt

SOAK = os.environ.get("IBTPO_SOAK") == "1"
KILLS = 20 if SOAK else 2
STEPS = 40 if SOAK else 6
PER_STEP = 8


def wait_for(condition, timeout_s: float, what: str) -> None:  # type: ignore[no-untyped-def]
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, f"no {what} within {timeout_s} s"
        time.sleep(0.05)


def wait_for_a_step(folder: Path, learner: Process) -> None:
    done = len(rows(folder, "step"))
    wait_for(lambda: len(rows(folder, "step")) > done or not learner.running(), 120, "further step")


def test_sigterm_lets_a_call_end(server: Server) -> None:
    """Not serving any more, the call in flight finished, status 0, and the journal kept."""
    assert server.process
    with ThreadPoolExecutor(1) as pool, Client(server.address) as client:
        before = client.queue_stats()
        call = pool.submit(client.sample_tree, prompt(0))
        wait_for(lambda: client.queue_stats().interactive or call.done(), 20, "tree growing")
        server.process.popen.terminate()
        assert call.result(timeout=60).trajectories == 12
    assert server.process.popen.wait(30) == 0
    server.start()
    with Client(server.address) as client:
        assert client.queue_stats().acked == before.acked


def test_kill_learner_and_server(server: Server, tmp_path: Path) -> None:
    server.push_original()
    write_prompts(tmp_path)
    with Client(server.address) as client:
        acked_before = client.queue_stats().acked
    line = learner_command(
        server.address, tmp_path, f"--steps={STEPS}", f"--prompts-per-step={PER_STEP}"
    )
    rng, log = random.Random(0), tmp_path / "learner.log"
    learner = Process(line, log)
    try:
        for kill in range(KILLS):
            wait_for_a_step(tmp_path, learner)
            time.sleep(rng.uniform(0, 1.5))
            learner.kill()
            if kill % 2:  # every other time the server too: it comes back with its newest weights
                with Client(server.address) as client:
                    served = client.get_weights()
                server.kill()
                server.start()
                with Client(server.address) as client:
                    again = client.get_weights()
                assert (again.version, again.digest) == (served.version, served.digest)
            learner = Process(line, log)
        wait_for(lambda: not learner.running(), 300, "end of the run")
        assert learner.popen.returncode == 0, learner.last_words()
    finally:
        learner.stop()
    steps = [row["step"] for row in rows(tmp_path, "step")]
    # a step may be reported twice if its checkpoint was not durable; none may be left out
    assert sorted(set(steps)) == [*range(1, STEPS + 1)]
    with Client(server.address) as client:
        stats = client.queue_stats()
    assert stats.acked - acked_before == STEPS * PER_STEP
    assert stats.queued == stats.growing == stats.graded == stats.leased == stats.dead == 0


def test_server_killed_under_a_running_learner(server: Server, tmp_path: Path) -> None:
    """The learner waits for the server to come back, and goes on with the same run."""
    server.push_original()
    write_prompts(tmp_path)
    learner = Process(
        learner_command(server.address, tmp_path, "--steps=4", f"--prompts-per-step={PER_STEP}"),
        tmp_path / "learner.log",
    )
    try:
        wait_for(lambda: len(rows(tmp_path, "step")) >= 1, 120, "first step")
        server.kill()
        server.start()
        wait_for(lambda: not learner.running(), 240, "end of the run")
        assert learner.popen.returncode == 0, learner.last_words()
    finally:
        learner.stop()
    assert [row["step"] for row in rows(tmp_path, "step")] == [1, 2, 3, 4]
    with Client(server.address) as client:
        stats = client.queue_stats()
    assert stats.queued == stats.growing == stats.graded == stats.leased == stats.dead == 0
