"""Files of rows, and what is read from them or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from ibtree.data.questions import Question, Reading, read_questions
from ibtree.errors import FieldError


def jsonl(folder: Path, *rows: dict) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(folder: Path, row_group_size: int = 2, **columns: list) -> Path:
    path = folder / "rows.parquet"
    parquet.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def read(source: str | Path, *fields: str | None, **choices: object) -> list[Question]:
    """By the names of the prompt's and the answer's field, where they are named."""
    named = dict(zip(("prompt_field", "answer_field"), fields, strict=False))
    return read_questions(source, Reading(**named, **choices))


def refused(source: str | Path, *fields: str | None, **choices: object) -> str:
    with pytest.raises(FieldError) as caught:
        read(source, *fields, **choices)
    message = str(caught.value)
    assert "\n" not in message and "; allowed: " in message
    return message
