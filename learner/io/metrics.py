"""metrics.jsonl: one JSON object a line, each with its `kind` and `step`."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from learner.errors import writing


class MetricsFile:
    """Opened at step `step`: rows of later steps, which will be taken again, and a line that a
    kill cut off are dropped, so that a resumed run leaves one row a step."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        retained = [
            line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step
        ]
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in retained]
        """What the run has reported so far."""
        with writing("metrics", path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            if retained != lines:
                fresh = path.with_suffix(".new")
                fresh.write_bytes(b"".join(retained))
                fresh.rename(path)
            self._file = path.open("a", encoding="utf-8")

    def has(self, kind: str, step: int) -> bool:
        return any(row["kind"] == kind and row["step"] == step for row in self.rows)

    def append(self, row: dict[str, Any]) -> None:
        """Returns when the row is durable; figures that are not finite become null."""
        row = {key: None if _unknown(value) else value for key, value in row.items()}
        with writing("metrics", self._path.parent):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self.rows.append(row)

    def close(self) -> None:
        self._file.close()


def _unknown(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
