"""Rows of prompts: a JSONL or Parquet file, or a Hugging Face dataset by name."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from ibtree.errors import FieldError

HUB = "hf:"
ALLOWED = f"a JSONL file, a .parquet file or {HUB}NAME[:CONFIG[:SPLIT]]"

Row = tuple[str, Any, Any]
"""A row of prompts: where it stands, its prompt, and its answer or None."""
Pick = Callable[[str, Collection[str]], tuple[str, str | None]]
"""The names of the prompt's and of the answer's field, from where a row stands and its fields."""


def rows(source: str, pick: Pick) -> Iterator[Row]:
    """The rows of a source. Raises FieldError that says where something cannot be read."""
    if source.startswith(HUB):
        return _hub_rows(source, pick)
    path = Path(source)
    if not path.is_file():
        raise FieldError("prompts", f"no file {path}", ALLOWED)
    return _parquet_rows(path, pick) if path.suffix == ".parquet" else _jsonl_rows(path, pick)


def _jsonl_rows(path: Path, pick: Pick) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"prompts {path}:{number}"
            try:
                entry = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise FieldError(where, f"{error!r}", "a JSON object, text in UTF-8") from error
            if not isinstance(entry, dict):
                raise FieldError(where, "no JSON object", 'objects {"prompt": text, ...}')
            prompt, answer = pick(where, entry.keys())
            yield where, entry[prompt], None if answer is None else entry[answer]


def _parquet_rows(path: Path, pick: Pick) -> Iterator[Row]:
    parquet = _module("pyarrow.parquet", "a Parquet file")
    arrow = _module("pyarrow", "a Parquet file")
    where, number = f"prompts {path}", 0
    try:
        with parquet.ParquetFile(path) as file:
            prompt, answer = pick(where, file.schema_arrow.names)
            columns = [prompt] if answer is None else [prompt, answer]
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{where} row {number}", row[prompt], row.get(answer)
    except arrow.ArrowException as error:
        problem = f"not readable after row {number}: {_one_line(error)}"
        raise FieldError(where, problem, "a Parquet file") from error


def _hub_rows(source: str, pick: Pick) -> Iterator[Row]:
    name, *parts = source.removeprefix(HUB).split(":")
    if not name or len(parts) > 2:
        raise FieldError("prompts", f"got {source}", ALLOWED)
    config, split = (*parts, "", "")[:2]
    where = f"prompts {source}"
    load = _module("datasets", "a Hugging Face dataset").load_dataset
    try:
        table = load(name, config or None, split=split or "train")
    except Exception as error:  # of many kinds: no such name, no network, broken files
        allowed = "a dataset that loads; the split is train unless it is named"
        raise FieldError(where, _one_line(error), allowed) from error
    prompt, answer = pick(where, table.column_names)
    columns = [prompt] if answer is None else [prompt, answer]
    for number, row in enumerate(table.select_columns(columns), 1):
        yield f"{where} row {number}", row[prompt], row.get(answer)


def _module(name: str, what: str) -> Any:
    """An optional package, imported only where it is needed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        problem = f"{what} needs the package {name.partition('.')[0]} ({error})"
        raise FieldError(
            "prompts", problem, "pip install '.[data]' in the checkout of ibtpo, or JSONL"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
