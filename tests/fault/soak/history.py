"""Whether a run's events are a history that the server may have: nothing here knows the server.

What it promises: a prompt it took is trained on, or dead by its own fault; a tree is handed to one
learner at a time, and never again after its ack; versions grow, and a version is its tensors. Each
break of a promise is one line of text that names the tree or the version.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, fields

from tests.fault.soak.events import Event, Kind

DEAD = "dead"


@dataclass
class Verdict:
    """Breaks of promises by kind; all empty for a server that keeps them."""

    lost: list[str] = field(default_factory=list)
    """Submitted, and at the end neither trained on nor cancelled nor dead."""
    doubled: list[str] = field(default_factory=list)
    """Trained on twice, or handed out again after its ack was confirmed."""
    wrongly_dead: list[str] = field(default_factory=list)
    """Dead, though something else was at fault."""
    leases_broken: list[str] = field(default_factory=list)
    """Ended, or handed to somebody else, while a learner held them."""
    mixed_weights: list[str] = field(default_factory=list)
    """Tokens of versions that never served or in another order; a version with a wrong digest."""
    backwards: list[str] = field(default_factory=list)
    """An older version served after a newer one."""

    @property
    def clean(self) -> bool:
        return not any(self.counts().values())

    def counts(self) -> dict[str, int]:
        return {f.name: len(getattr(self, f.name)) for f in fields(self)}


def check(events: Iterable[Event]) -> Verdict:
    """The verdict on events in order of time."""
    ordered = list(events)
    verdict = Verdict()
    _check_ends(ordered, verdict)
    _check_training(ordered, verdict)
    _check_leases(ordered, verdict)
    _check_versions(ordered, verdict)
    _check_trees(ordered, verdict)
    return verdict


def _check_ends(events: list[Event], verdict: Verdict) -> None:
    """What became of each prompt."""
    over = {e["id"] for e in events if e.kind in (Kind.TRAINED, Kind.CANCELLED)}
    dead = {e["id"]: e["reasons"] for e in events if e.kind is Kind.ENDED and e["state"] == DEAD}
    states = {e["id"]: e["state"] for e in events if e.kind is Kind.ENDED}
    poison = {e["id"]: e["poison"] for e in events if e.kind is Kind.SUBMITTED}
    for id_, poisoned in poison.items():
        if id_ in dead:
            if not poisoned:
                verdict.wrongly_dead.append(f"{id_}: {'; '.join(dead[id_])}")
        elif id_ not in over:
            verdict.lost.append(f"{id_}: {states.get(id_, 'not in the journal')}")


def _check_training(events: list[Event], verdict: Verdict) -> None:
    """No tree is trained on twice, nor handed out again after its ack."""
    trained: set[str] = set()
    acked: dict[str, float] = {}
    for event in events:
        match event.kind:
            case Kind.TRAINED:
                if event["id"] in trained:
                    verdict.doubled.append(f"{event['id']}: trained on twice")
                trained.add(event["id"])
            case Kind.ACKED:
                acked.setdefault(event["id"], event.at_s)
            case Kind.LEASED if event["asked_s"] > acked.get(event["id"], event.at_s):
                verdict.doubled.append(f"{event['id']}: handed out again after its ack")


@dataclass
class _Held:
    lease: str
    until_s: float
    """It lasts at least so long: from when it was asked for."""


def _check_leases(events: list[Event], verdict: Verdict) -> None:
    """A lease lasts as long as it was given for, and until then is the only one of its tree."""
    held: dict[str, _Held] = {}
    for event in events:
        match event.kind:
            case Kind.LEASED:
                id_, before = event["id"], held.get(event["id"])
                if before and event.at_s < before.until_s:
                    left_s = before.until_s - event.at_s
                    verdict.leases_broken.append(f"{id_}: leased twice, {left_s:.1f} s too early")
                held[id_] = _Held(event["lease"], event["asked_s"] + event["lease_s"])
            case Kind.GONE:
                mine = held.get(event["id"])
                if mine and mine.lease == event["lease"]:
                    if event.at_s < mine.until_s:
                        left_s = mine.until_s - event.at_s
                        words = f"{event['id']}: its lease ended {left_s:.1f} s too early"
                        verdict.leases_broken.append(words)
                    del held[event["id"]]
            case Kind.ACKED | Kind.RETURNED:
                mine = held.get(event["id"])
                if mine and mine.lease == event["lease"]:
                    del held[event["id"]]


def _refused(events: list[Event]) -> set[tuple[int, str]]:
    """Versions with digests that were sent and certainly not taken: each time refused."""
    sent: dict[tuple[int, str], int] = defaultdict(int)
    for event in events:
        if event.kind in (Kind.SENT, Kind.REFUSED):
            key = event["version"], event["digest"]
            sent[key] += 1 if event.kind is Kind.SENT else -1
    return {key for key, unresolved in sent.items() if not unresolved}


def _check_versions(events: list[Event], verdict: Verdict) -> None:
    """Versions grow, and each is the tensors that were pushed under its number or, by a rollback,
    those of an older one."""
    sent: dict[int, set[str]] = defaultdict(set)
    known: dict[int, str] = {}
    refused, rolled_back = _refused(events), False
    answered_s: list[float] = []
    newest: list[int] = []
    """Of all the answers until then."""
    for event in events:
        match event.kind:
            case Kind.SENT:
                sent[event["version"]].add(event["digest"])
            case Kind.ROLLBACK:
                rolled_back = True
            case Kind.SERVED:
                version, digest = event["version"], event["digest"]
                before = bisect_left(answered_s, event["asked_s"])
                if before and version < newest[before - 1]:
                    verdict.backwards.append(
                        f"version {version} after version {newest[before - 1]}"
                    )
                answered_s.append(event.at_s)
                newest.append(max([version, *newest[-1:]]))
                if version in known:
                    fits = known[version] == digest
                else:
                    pushed = digest in sent[version] and (version, digest) not in refused
                    older = {d for v, d in known.items() if v < version}
                    older |= {d for v, digests in sent.items() if v < version for d in digests}
                    fits = pushed or (rolled_back and digest in older) or not (version or digest)
                    known[version] = digest
                if not fits:
                    verdict.mixed_weights.append(f"version {version} with digest {digest[:12]}…")


def _check_trees(events: list[Event], verdict: Verdict) -> None:
    """Along a path versions only grow, and each of them served or may have."""
    refused = _refused(events)
    served = {e["version"] for e in events if e.kind is Kind.SERVED} | {0}
    sent_at: dict[int, float] = {}
    for event in events:
        if event.kind is Kind.SENT and (event["version"], event["digest"]) not in refused:
            sent_at.setdefault(event["version"], event.at_s)
    for event in events:
        if event.kind is not Kind.LEASED:
            continue
        for path in event["paths"]:
            if path != sorted(path):
                verdict.mixed_weights.append(f"{event['id']}: versions {path} along one path")
            for version in set(path) - served:
                if sent_at.get(version, event.at_s) >= event.at_s:
                    words = f"{event['id']}: tokens of version {version}, which never served"
                    verdict.mixed_weights.append(words)
