"""What the journal acknowledged is there after SIGKILL at any moment."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from server_ext.queue.journal import Journal
from server_ext.queue.states import State
from tests import ROOT
from tests.server_ext.queue.book import rows

AFTER = {
    "submit": "queued",
    "take": "growing",
    "store": "graded",
    "lease": "leased",
    "ack": "acked",
    "nack": "graded",
}
KILLS = 10


def killed_run(path: Path, seed: int, seconds: float) -> list[dict]:
    """What a child said until it was killed `seconds` after its first word."""
    command = [sys.executable, "-m", "tests.server_ext.queue.journal_child", str(path), str(seed)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=os.environ) as child:
        assert child.stdout
        first = child.stdout.readline()
        time.sleep(seconds)
        child.kill()
        rest = child.stdout.read()
    lines = (first + rest).split(b"\n")
    return [json.loads(line) for line in lines[:-1]]  # the last one may be torn


class Expected:
    """States by the lines that were said; of the call under way either outcome is right."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.leases: dict[str, str] = {}
        self.done = 0

    def follow(self, lines: list[dict]) -> dict | None:
        """Takes note of what was done; returns the call under way."""
        for line in lines:
            if "done" in line:
                self.done += 1
                self.states |= dict.fromkeys(line["ids"], AFTER[line["done"]])
                self.leases |= line.get("leases", {})
                if line["done"] in ("ack", "nack"):
                    self.leases = {i: x for i, x in self.leases.items() if i not in line["ids"]}
        return lines[-1] if "call" in lines[-1] else None

    def check(self, states: dict[str, str], under_way: dict | None) -> None:
        call, ids = (under_way or {}).get("call"), (under_way or {}).get("ids")
        assert set(self.states) <= set(states)
        changed = {i for i, state in states.items() if self.states.get(i) != state}
        if not changed:
            return
        assert call, f"not as acknowledged: {changed}"
        assert {states[i] for i in changed} == {AFTER[call]}
        if ids is None:  # take and lease choose their trees: two at most
            assert len(changed) <= 2
        else:
            assert changed == set(ids)  # the whole call or nothing of it

    def reopened(self, states: dict[str, str]) -> None:
        self.states = {i: "queued" if s == "growing" else s for i, s in states.items()}


def test_everything_acknowledged_survives_a_kill(tmp_path):
    rng, expected = random.Random(0), Expected()
    path = tmp_path / "journal.sqlite"
    torn = 0
    for seed in range(KILLS):
        under_way = expected.follow(killed_run(path, seed, rng.uniform(0.0, 0.2)))
        torn += under_way is not None
        expected.check(rows(path), under_way)
        journal = Journal(path)
        states = rows(path)
        expected.reopened(states)
        assert State.GROWING not in states.values()
        for id_, (state, tree, prompt) in rows(path, "state, tree, prompt").items():
            assert prompt == (None if state == "acked" else id_.encode())
            assert tree in ({None} if state == "acked" else {None, b"tree " + id_.encode()})
            assert state not in ("graded", "leased") or tree
        check_usable(journal, expected)
        journal.close()
    assert torn
    assert expected.done > 100


def check_usable(journal: Journal, expected: Expected) -> None:
    """An acknowledged lease can still be acked; its tree leaves the game."""
    leased = [i for i, s in expected.states.items() if s == "leased" and i in expected.leases]
    journal.ack([expected.leases[i] for i in leased[:1]])
    expected.states |= dict.fromkeys(leased[:1], "acked")
