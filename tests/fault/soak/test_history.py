"""The checker on small histories: each break of a promise is found, and nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fault.soak.events import Event, EventLog, Kind, read_events
from tests.fault.soak.history import check

D1, D2 = "11", "22"


def submitted(id_: str, poison: bool = False) -> tuple[Kind, dict[str, Any]]:
    return Kind.SUBMITTED, {"id": id_, "poison": poison}


def leased(
    id_: str, lease: str, *paths: list[int], asked_s: float | None = None, lease_s: float = 1e6
) -> tuple[Kind, dict[str, Any]]:
    facts = {"id": id_, "lease": lease, "lease_s": lease_s, "paths": list(paths)}
    return Kind.LEASED, facts | ({} if asked_s is None else {"asked_s": asked_s})


def trained(id_: str) -> tuple[Kind, dict[str, Any]]:
    return Kind.TRAINED, {"id": id_}


def acked(id_: str, lease: str) -> tuple[Kind, dict[str, Any]]:
    return Kind.ACKED, {"id": id_, "lease": lease}


def gone(id_: str, lease: str) -> tuple[Kind, dict[str, Any]]:
    return Kind.GONE, {"id": id_, "lease": lease}


def returned(id_: str, lease: str) -> tuple[Kind, dict[str, Any]]:
    return Kind.RETURNED, {"id": id_, "lease": lease, "reason": "no"}


def ended(id_: str, state: str, *reasons: str) -> tuple[Kind, dict[str, Any]]:
    return Kind.ENDED, {"id": id_, "state": state, "reasons": list(reasons)}


def sent(version: int, digest: str) -> tuple[Kind, dict[str, Any]]:
    return Kind.SENT, {"version": version, "digest": digest}


def refused(version: int, digest: str) -> tuple[Kind, dict[str, Any]]:
    return Kind.REFUSED, {"version": version, "digest": digest, "code": "INVALID_ARGUMENT"}


def served(version: int, digest: str, asked_s: float | None = None) -> tuple[Kind, dict[str, Any]]:
    facts = {"version": version, "digest": digest}
    return Kind.SERVED, facts | ({} if asked_s is None else {"asked_s": asked_s})


CANCELLED = (Kind.CANCELLED, {"id": "x"})
ROLLBACK = (Kind.ROLLBACK, dict[str, Any]())


def found(*told: tuple[Kind, dict[str, Any]]) -> dict[str, int]:
    """Counts, where there are any, of a history with an event each second; calls are answered
    half a second after they were asked, unless an event says otherwise."""
    events = [
        Event(float(at), kind, {"asked_s": at - 0.5, **facts})
        for at, (kind, facts) in enumerate(told)
    ]
    return {name: count for name, count in check(events).counts().items() if count}


GOOD = [
    pytest.param([submitted("x"), leased("x", "l"), trained("x"), acked("x", "l")], id="trained"),
    pytest.param([submitted("x", poison=True), ended("x", "dead", "bad")], id="poison dies"),
    pytest.param([submitted("x"), CANCELLED], id="cancelled"),
    pytest.param(
        [
            submitted("x"),
            leased("x", "l", lease_s=1),
            trained("x"),
            leased("x", "m"),
            acked("x", "m"),
        ],
        id="killed before the ack: it comes again when the lease is over, and is acked",
    ),
    pytest.param(
        [submitted("x"), leased("x", "l"), returned("x", "l"), leased("x", "m"), trained("x")],
        id="handed back and out again",
    ),
    pytest.param(
        [submitted("x"), leased("x", "l", lease_s=1), trained("x"), gone("x", "l")],
        id="a lease that ran out is gone",
    ),
    pytest.param(
        [sent(1, D1), served(1, D1), sent(2, D2), served(2, D2), ROLLBACK, served(3, D1)],
        id="pushed and rolled back",
    ),
    pytest.param([served(0, ""), sent(1, D1), served(1, D1)], id="from the model folder on"),
    pytest.param(
        [sent(1, D1), served(1, D1), served(0, "", asked_s=0.2)],
        id="answers that overtake each other",
    ),
    pytest.param(
        [sent(1, D1), refused(1, D1), sent(1, D2), served(1, D2)], id="refused, then another as 1"
    ),
    pytest.param(
        [sent(1, D1), leased("x", "l", [0, 1], [0])], id="tokens of a version whose answer was lost"
    ),
]


@pytest.mark.parametrize("told", GOOD)
def test_good_histories_are_clean(told: list[tuple[Kind, dict[str, Any]]]) -> None:
    assert found(*told) == {}


BAD = [
    pytest.param("lost", [submitted("x"), ended("x", "queued")], id="still queued"),
    pytest.param("lost", [submitted("x")], id="not in the journal"),
    pytest.param("lost", [submitted("x"), ended("x", "acked")], id="acked by nobody"),
    pytest.param("lost", [submitted("x", poison=True), ended("x", "queued")], id="poison for ever"),
    pytest.param(
        "wrongly_dead", [submitted("x"), ended("x", "dead", "lease ran out")], id="an outage kills"
    ),
    pytest.param("doubled", [submitted("x"), trained("x"), trained("x")], id="trained on twice"),
    pytest.param(
        "doubled",
        [submitted("x"), leased("x", "l"), trained("x"), acked("x", "l"), leased("x", "m")],
        id="handed out after its ack",
    ),
    pytest.param(
        "leases_broken",
        [submitted("x"), leased("x", "l"), leased("x", "m"), trained("x")],
        id="two hold one tree",
    ),
    pytest.param(
        "leases_broken",
        [submitted("x"), leased("x", "l"), trained("x"), gone("x", "l")],
        id="a lease ended early",
    ),
    pytest.param("mixed_weights", [sent(1, D1), served(1, D2)], id="tensors of nobody"),
    pytest.param(
        "mixed_weights", [sent(1, D1), served(1, D1), ROLLBACK, served(1, D2)], id="two digests"
    ),
    pytest.param(
        "mixed_weights", [sent(1, D1), refused(1, D1), served(1, D1)], id="refused and served"
    ),
    pytest.param(
        "mixed_weights", [sent(1, D1), served(1, D1), served(2, D1)], id="not rolled back"
    ),
    pytest.param("mixed_weights", [sent(1, D1), leased("x", "l", [1, 0])], id="older after newer"),
    pytest.param("mixed_weights", [leased("x", "l", [3])], id="tokens of a version nobody sent"),
    pytest.param(
        "mixed_weights", [leased("x", "l", [1]), sent(1, D1)], id="tokens of a version sent later"
    ),
    pytest.param(
        "mixed_weights",
        [sent(1, D1), refused(1, D1), leased("x", "l", [1])],
        id="tokens of a refused version",
    ),
    pytest.param(
        "backwards",
        [sent(1, D1), served(1, D1), sent(2, D2), served(2, D2), served(1, D1)],
        id="an older version again",
    ),
]


@pytest.mark.parametrize(("kind", "told"), BAD)
def test_each_break_of_a_promise_is_found(
    kind: str, told: list[tuple[Kind, dict[str, Any]]]
) -> None:
    assert found(*told) == {kind: 1}


def test_the_break_is_named() -> None:
    verdict = check(
        [Event(0, *submitted("a/7")), Event(1, *ended("a/7", "dead", "disk", "grader"))]
    )
    assert verdict.wrongly_dead == ["a/7: disk; grader"]
    assert not verdict.clean


def test_a_line_that_a_killed_writer_left_half_written_is_no_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventLog(path).write(Kind.TRAINED, id="x", durably=True)
    with path.open("ab") as file:
        file.write(b'{"at_s": 1, "ki')
    assert [event["id"] for event in read_events([path])] == ["x"]
    EventLog(path).write(Kind.TRAINED, id="y")
    assert [event["id"] for event in read_events([path])] == ["x", "y"]
