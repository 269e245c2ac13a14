"""Time as the journal counts it: what the wall clock is set to does not matter.

Seconds since the machine started, which a restart of the server does not change. A deadline from
before the machine was started again has no meaning on the new clock; the journal renews it
(database.py), so that no lease ends early and none is immortal.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PROCESS = uuid.uuid4().hex


def now_s() -> float:
    """Seconds since the machine started, those asleep included."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def boot() -> str:
    """Names the start of the machine since which `now_s` counts; where nobody knows it, this
    process."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return _PROCESS
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return _PROCESS
