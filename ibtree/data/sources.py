"""Rows of prompts: JSONL, JSON or Parquet files, or a Hugging Face dataset by name."""

from __future__ import annotations

import codecs
import gzip
import importlib
import json
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from glob import glob
from io import BufferedIOBase
from itertools import chain
from pathlib import Path
from typing import Any

from ibtree.errors import FieldError

HUB = "hf:"
ALLOWED = f"a JSONL, JSON or .parquet file, a folder or glob of them, or {HUB}NAME[:CONFIG[:SPLIT]]"
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")

Row = tuple[str, tuple[Any, Any] | FieldError]
"""A row of prompts: where it stands; its prompt, and its answer or None; or what is bad in it."""
Pick = Callable[[str, Collection[str]], tuple[str, str | None]]
"""The names of the prompt's and of the answer's field, from where a row stands and its fields."""


def rows(source: str, pick: Pick) -> Iterator[Row]:
    """The rows of a source, those of several files in order of their names. Raises FieldError for
    a source or file that cannot be read; a bad row is one of the rows."""
    if source.startswith(HUB):
        return _hub_rows(source, pick)
    return chain.from_iterable(_file_rows(path, pick) for path in _files(source))


def _files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith(_SUFFIXES))
        if not files:
            raise FieldError("prompts", f"no file *{', *'.join(_SUFFIXES)} in {path}", ALLOWED)
        return files
    if path.is_file():
        return [path]
    matching = sorted(Path(name) for name in glob(source, recursive=True))  # noqa: PTH207
    matching = [file for file in matching if file.is_file()]
    if not matching:
        raise FieldError("prompts", f"no file {path}", ALLOWED)
    return matching


def _file_rows(path: Path, pick: Pick) -> Iterator[Row]:
    if path.suffix == ".parquet":
        return _parquet_rows(path, pick)
    whole = path.name.endswith((".json", ".json.gz"))
    return _array_rows(path, pick) if whole else _jsonl_rows(path, pick)


def field_of(entry: Mapping[str, Any], name: str) -> Any:
    """The value of a field, or of one in a field that holds fields: `reward_model.ground_truth`.
    None where there is none."""
    if name in entry:
        return entry[name]
    outer, dot, inner = name.partition(".")
    below = entry.get(outer)
    return field_of(below, inner) if dot and isinstance(below, Mapping) else None


def _names(entry: Mapping[str, Any]) -> list[str]:
    """Names of the fields, and dotted ones of those in fields that hold fields."""
    inner = [f"{k}.{n}" for k, v in entry.items() if isinstance(v, Mapping) for n in _names(v)]
    return [*entry, *inner]


def _row(where: str, entry: Any, pick: Pick) -> Row:
    if not isinstance(entry, dict):
        return where, FieldError(where, "no JSON object", 'objects {"prompt": text, ...}')
    try:
        prompt, answer = pick(where, _names(entry))
    except FieldError as error:
        return where, error
    return where, (field_of(entry, prompt), None if answer is None else field_of(entry, answer))


def _jsonl_rows(path: Path, pick: Pick) -> Iterator[Row]:
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if number == 1 and _is_array(line):
                    yield from _array_rows(path, pick)
                    return
                if line.strip():
                    yield _line_row(f"prompts {path}:{number}", line, pick)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise FieldError(f"prompts {path}", _one_line(error), "a whole gzip file") from error


def _line_row(where: str, line: bytes, pick: Pick) -> Row:
    try:
        return _row(where, _parsed(where, line), pick)
    except FieldError as error:
        return where, error


def _array_rows(path: Path, pick: Pick) -> Iterator[Row]:
    """A file that is a JSON array; one that is JSON lines all the same is read as such."""
    try:
        with _opened(path) as file:
            data = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise FieldError(f"prompts {path}", _one_line(error), "a whole gzip file") from error
    if not _is_array(data):
        yield from _jsonl_rows(path, pick)
        return
    for number, entry in enumerate(_parsed(f"prompts {path}:1", data), 1):
        yield _row(f"prompts {path} row {number}", entry, pick)


def _is_array(data: bytes) -> bool:
    return data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _opened(path: Path) -> BufferedIOBase:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _parsed(where: str, data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise FieldError(where, f"{error!r}", "a JSON object, text in UTF-8") from error


def _parquet_rows(path: Path, pick: Pick) -> Iterator[Row]:
    parquet = _module("pyarrow.parquet", "a Parquet file")
    arrow = _module("pyarrow", "a Parquet file")
    where, number = f"prompts {path}", 0
    try:
        with parquet.ParquetFile(path) as file:
            prompt, answer = pick(where, _dotted(file.schema_arrow, arrow))
            wanted = _columns(file.schema_arrow.names, prompt, answer)
            for batch in file.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    value = None if answer is None else field_of(row, answer)
                    yield f"{where} row {number}", (field_of(row, prompt), value)
    except arrow.ArrowException as error:
        problem = f"not readable after row {number}: {_one_line(error)}"
        raise FieldError(where, problem, "a Parquet file") from error


def _columns(names: list[str], prompt: str, answer: str | None) -> list[str]:
    """The columns that hold the two fields."""
    wanted = [name for name in (prompt, answer) if name]
    return sorted({name if name in names else name.partition(".")[0] for name in wanted})


def _dotted(fields: Any, arrow: Any) -> list[str]:
    """Names of a schema's columns, and dotted ones of those in columns that hold fields."""
    names: list[str] = []
    for field in fields:
        names.append(field.name)
        if arrow.types.is_struct(field.type):
            inner = [field.type.field(i) for i in range(field.type.num_fields)]
            names += [f"{field.name}.{name}" for name in _dotted(inner, arrow)]
    return names


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
    prompt, answer = pick(where, _names(table.features))
    wanted = _columns(table.column_names, prompt, answer)
    for number, row in enumerate(table.select_columns(wanted), 1):
        value = None if answer is None else field_of(row, answer)
        yield f"{where} row {number}", (field_of(row, prompt), value)


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
