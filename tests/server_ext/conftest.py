"""Fixtures of the server's tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server_ext.queue.book import Book
from tests.server_ext.versions import Served


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """What a test's server or SGLang does to the root logger ends with the test."""
    root = logging.getLogger()
    level, handlers = root.level, [*root.handlers]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Book]:
    book = Book(tmp_path / "deep" / "journal.sqlite", {"max_returns": 2, "max_failures": 3})
    yield book
    book.journal.close()


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path)
