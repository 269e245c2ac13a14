"""The journal against a dictionary, under random calls, clocks and re-openings."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from server_ext.errors import ConflictError, UnknownLeaseError
from server_ext.queue.states import State, pause_s
from tests.server_ext.queue.book import Book

MAX_RETURNS, MAX_FAILURES = 1, 2
IDS = [f"{i}" for i in range(8)]
PICKS = st.lists(st.integers(0, 20), max_size=3)
ENDS = ["fail", "requeue", "interrupt"]


@dataclass
class Row:
    prompt: bytes
    state: str = "queued"
    tree: bytes | None = None
    failures: int = 0
    interruptions: int = 0
    rests_until: float = 0.0
    returns: int = 0
    refusals: int = 0
    reasons: list[str] = field(default_factory=list)
    lease_id: str | None = None
    until: float = 0.0


class JournalMachine(RuleBasedStateMachine):
    @initialize()
    def open(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        limits = {"max_returns": MAX_RETURNS, "max_failures": MAX_FAILURES}
        self.book = Book(Path(self.folder.name) / "j.sqlite", limits)
        self.model: dict[str, Row] = {}  # in order of submission
        self.old_leases = ["unknown"]

    def teardown(self) -> None:
        self.book.journal.close()
        self.folder.cleanup()

    def among(self, *states: str) -> list[str]:
        return [i for i, row in self.model.items() if row.state in states]

    def give_back(self, id_: str, reason: str, *, bad: bool = False) -> None:
        row = self.model[id_]
        row.returns += 1
        row.refusals += bad
        row.lease_id = None
        row.reasons.append(reason)
        row.state = "dead" if bad and row.refusals > MAX_RETURNS else "graded"

    def look_at_the_clock(self) -> int:
        lost = [i for i in self.among("leased") if self.model[i].until < self.book.now]
        for id_ in lost:
            self.give_back(id_, "lease ran out")
        return len(lost)

    @rule(chosen=st.lists(st.tuples(st.sampled_from(IDS), st.integers(0, 9)), max_size=4))
    def submit(self, chosen: list[tuple[str, int]]) -> None:
        prompts = [(i, b"p" if n else b"q") for i, n in chosen]
        fresh: dict[str, Row] = {}
        clash = False
        for id_, prompt in prompts:
            row = self.model.get(id_) or fresh.setdefault(id_, Row(prompt))
            clash |= row.prompt != prompt
        if clash:
            with pytest.raises(ConflictError):
                self.book.journal.submit(prompts)
            return
        counts = self.book.journal.submit(prompts)
        assert counts == (len(fresh), len(prompts) - len(fresh))
        self.model |= fresh

    @rule(count=st.integers(0, 3))
    def take(self, count: int) -> None:
        rested = [i for i in self.among("queued") if self.model[i].rests_until <= self.book.now]
        expected = rested[:count]
        assert [queued.id for queued in self.book.journal.take(count)] == expected
        for id_ in expected:
            self.model[id_].state = "growing"

    @rule(pick=st.integers(0, 20), how=st.sampled_from(["store", "store", *ENDS]))
    def end_growth(self, pick: int, how: str) -> None:
        growing = self.among("growing")
        if not growing:
            return
        id_ = growing[pick % len(growing)]
        row, journal = self.model[id_], self.book.journal
        if how == "store":
            row.state, row.tree, row.interruptions = "graded", id_.encode() * (1 + pick), 0
            journal.store(id_, row.tree)
        elif how == "interrupt":
            row.interruptions += 1
            row.reasons.append(f"away {pick}")
            row.state = "queued"
            rest_s = journal.interrupt(id_, f"away {pick}")
            assert rest_s == pause_s(row.interruptions)
            row.rests_until = self.book.now + rest_s
        elif how == "requeue":
            row.state = "queued"
            journal.requeue(id_)
        else:
            row.failures += 1
            row.interruptions = 0
            row.reasons.append(f"why {pick}")
            row.state = "dead" if row.failures >= MAX_FAILURES else "queued"
            assert journal.fail(id_, f"why {pick}") == row.state

    @rule(count=st.integers(0, 4), lease_s=st.integers(1, 9), max_bytes=st.integers(0, 40))
    def lease(self, count: int, lease_s: int, max_bytes: int) -> None:
        self.look_at_the_clock()
        expected, apart, total = [], set(), 0
        for id_ in self.among("graded")[:count]:
            size = len(self.model[id_].tree or b"")
            if size > max_bytes:
                apart.add(id_)
            elif (total := total + size) > max_bytes:
                break
            expected.append(id_)
        leased = self.book.journal.lease(count, lease_s, max_bytes)
        assert [(lease.id, lease.tree, lease.returns) for lease in leased] == [
            (i, None if i in apart else self.model[i].tree, self.model[i].returns) for i in expected
        ]
        for id_, lease in zip(expected, leased, strict=True):
            row = self.model[id_]
            row.state, row.lease_id, row.until = "leased", lease.lease_id, self.book.now + lease_s
            self.old_leases.append(lease.lease_id)

    @rule(picks=PICKS, how=st.sampled_from(["extend", "ack", "nack", "nack", "bury"]))
    def end_leases(self, picks: list[int], how: str) -> None:
        """Ends leases from any time, most often recent ones."""
        chosen = list(dict.fromkeys(self.old_leases[-1 - p % len(self.old_leases)] for p in picks))
        extra = {"extend": [5.0], "ack": [], "nack": ["no"], "bury": ["bad"]}[how]
        bad = how == "nack" and len(picks) > 1
        if any(lease_id not in self.holders(how) for lease_id in chosen):
            with pytest.raises(UnknownLeaseError):
                getattr(self.book.journal, how)(chosen, *extra)
            return
        self.look_at_the_clock()
        getattr(self.book.journal, how)(chosen, *extra, **({"bad": True} if bad else {}))
        for lease_id in chosen:
            id_ = self.holders(how)[lease_id]
            row = self.model[id_]
            if how == "extend":
                row.until = self.book.now + 5.0
            elif how == "nack":
                self.give_back(id_, "no", bad=bad)
            elif how == "bury":
                row.state, row.lease_id = "dead", None
                row.reasons.append("bad")
            else:
                row.state, row.tree = "acked", None

    def holders(self, how: str) -> dict[str | None, str]:
        """{lease: tree} of the leases that the call may name."""
        leased = [i for i in self.among("leased") if self.model[i].until >= self.book.now]
        return {self.model[i].lease_id: i for i in leased + self.among("acked") * (how == "ack")}

    @rule(seconds=st.integers(1, 6))
    def wait(self, seconds: int) -> None:
        self.book.now += seconds

    @rule()
    def expire(self) -> None:
        lost = self.look_at_the_clock()
        assert self.book.journal.expire() == lost

    @rule()
    def reopen(self) -> None:
        for id_ in self.among("growing"):
            self.model[id_].state = "queued"
        self.book.reopen()

    @rule()
    def count(self) -> None:
        self.look_at_the_clock()
        counts = self.book.journal.counts()
        assert counts == {state: len(self.among(state)) for state in State}

    @invariant()
    def same(self) -> None:
        columns = "state, tree, failures, returns, refusals, reasons, lease_id"
        rows = self.book.rows(columns)
        assert list(rows) == list(self.model)
        for id_, row in self.model.items():
            counted = (row.failures, row.returns, row.refusals)
            reasons = json.dumps(row.reasons[-8:])
            assert rows[id_] == (row.state, row.tree, *counted, reasons, row.lease_id)


JournalMachine.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestJournal = JournalMachine.TestCase
