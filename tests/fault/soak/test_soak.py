"""The soak in short: a real server, a fault of each kind that needs no long outage, two runs."""

from __future__ import annotations

from pathlib import Path

from tests.fault.soak.coverage import Fault, Strike
from tests.fault.soak.run import Soak
from tests.fault.soak.servers import RealServer

STRIKES: list[Strike] = [
    (Fault.LEARNER_KILLED, "announced"),
    (Fault.CONNECTIONS_RESET, "received"),
    (Fault.PUSH_CUT, "verified"),
    (Fault.CLOCK_STEP, "serving"),
    (Fault.GRADER_KILLED, "serving"),
    (Fault.SCHEDULER_STOPPED, "applied"),
    (Fault.SERVER_KILLED, "applied"),
    (Fault.DISK_FULL, "serving"),
]


async def test_promises_hold_under_faults(tmp_path: Path) -> None:
    soak = Soak(tmp_path, 1, RealServer())
    report = await soak.run(STRIKES, for_s=240.0, drain_s=60.0)
    left_out = soak.site.faults_left_out
    assert set(report.faults) == {fault for fault, _ in STRIKES if fault not in left_out}
    assert vars(report.verdict) == {name: [] for name in vars(report.verdict)}
    assert report.prompts["acked"]
