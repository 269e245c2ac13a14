"""Short learner runs of the arith task for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import processes
import task


def write_prompts(folder: Path, terms: int = 6) -> None:
    train, held_out = task.split(512, 256, terms, seed=2)
    task.write_jsonl(folder / "train.jsonl", train)
    task.write_jsonl(folder / "held_out.jsonl", held_out)


def learner_command(address: str, folder: Path, *arguments: str) -> list[str]:
    return processes.learner_command(
        address, folder / "train.jsonl", folder / "run", "--threads=1", "--lease-s=20", *arguments
    )


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [row for row in map(json.loads, lines) if row["kind"] == kind]
