"""Seconds of processor time of SGLang's scheduler by what it does, noted from inside its process.

`install` in the scheduler's process (SGLang's children import the main module again), `Clock.read`
in the one that started it. The scheduler writes whenever it is idle.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

VARIABLE = "IBTPO_BENCH_CLOCK"
"""The file that is written."""
PARTS = {
    "get_next_batch_to_run": "plan",
    "process_batch_result": "results",
}
"""Methods of SGLang's Scheduler, and what they are called here: matching and admission are in plan,
inserting into the radix cache and streaming in results."""


def install() -> None:
    """Wraps the scheduler's methods, if the environment names a file."""
    if not (path := os.environ.get(VARIABLE)):
        return
    from sglang.srt.managers.scheduler import Scheduler

    seconds: dict[str, float] = {}

    def add(part: str, began: float) -> None:
        seconds[part] = seconds.get(part, 0.0) + time.thread_time() - began

    def timed(part_of: Callable[..., str], original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            part, began = part_of(*args), time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                add(part, began)

        return run

    def kind(_: Any, batch: Any, *__: Any) -> str:
        part = "decode" if batch.forward_mode.is_decode() else "prefill"
        for name, more in ((f"{part}_passes", 1), (f"{part}_rows", len(batch.reqs))):
            seconds[name] = seconds.get(name, 0) + more
        return part

    def receiving(scheduler: Any, *_: Any) -> str:
        return "receive" if scheduler.last_batch else "idle"

    for method, name in PARTS.items():
        setattr(Scheduler, method, timed(lambda *_, name=name: name, getattr(Scheduler, method)))
    Scheduler.ingest_requests = timed(receiving, Scheduler.ingest_requests)
    Scheduler.run_batch = timed(kind, Scheduler.run_batch)
    on_idle = Scheduler.on_idle
    written: dict[str, float] = {}

    def idle(scheduler: Any) -> None:
        now = {name: value for name, value in seconds.items() if name != "idle"}
        if now != written:
            Path(path).write_text(json.dumps(seconds))
            written.clear()
            written.update(now)
        on_idle(scheduler)

    Scheduler.on_idle = idle


class Clock:
    """What the scheduler noted in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, float]:
        """Seconds by part, and the number of passes and of their rows, since the start."""
        time.sleep(0.3)  # it is idle, and has written
        found: dict[str, float] = json.loads(self._path.read_text())
        return found
