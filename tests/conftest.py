"""Fixtures of every test: torch on one thread, and one real engine for the whole session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the engine shares the two cores

from tests.engine import Server

ENGINES = {"fault", "loop"}
"""Folders whose tests start engines."""


@pytest.hookimpl(tryfirst=True)  # before xdist's own, which reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker has all engines, so that there is one at a time."""
    for item in items:
        if ENGINES.intersection(item.path.relative_to(Path(__file__).parent).parts):
            item.add_marker(pytest.mark.xdist_group("engines"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    """xdist 3.8 names a test's group in its id; pytest 9.2 does not let it, and says nothing."""
    folders = tuple(f"tests/{name}/" for name in ENGINES)
    engines = [id_ for id_ in ids if id_.startswith(folders)]
    grouped = all(id_.endswith("@engines") for id_ in engines)
    if node.config.getoption("dist") == "loadgroup" and not grouped:
        pytest.exit("xdist does not group tests: two workers would have engines", returncode=4)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The session's ibtpo-server of the arith model: a real SGLang engine on the CPU."""
    server = Server(Path(tmp_path_factory.mktemp("server")))
    try:
        server.start()
        yield server
    finally:
        server.stop()
