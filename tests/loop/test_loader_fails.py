"""A real engine whose model's loader raises: the old version serves, or the server says that it has
to be restarted, and serves the newest version that served when it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ibtree import Client
from ibtree.client import RpcFailed
from server_ext.supervisor import CRASHED
from tests import ROOT
from tests.engine import Server, model_weights
from tests.loop.models.names import FAILURES_VARIABLE, MODELS
from tests.loop.test_weights_damaged import greedy


@pytest.fixture
def failing(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of its own; the session's engine makes room."""
    server.stop()
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("SGLANG_EXTERNAL_MODEL_PACKAGE", MODELS)
    monkeypatch.setenv(FAILURES_VARIABLE, str(tmp_path / "failures"))
    own = Server(tmp_path)
    try:
        own.start()
        yield own
    finally:
        own.stop()
        monkeypatch.undo()
        server.start()


def test_a_loader_that_raises(failing: Server, tmp_path: Path) -> None:
    first, second = (model_weights(noise=0.3, seed=seed) for seed in (1, 2))
    failing.push(first)
    with Client(failing.address) as client:
        said = greedy(client)
        (tmp_path / "failures").write_text("x." * 5)  # each time the client tries again
        with pytest.raises(RpcFailed, match="no such parameter in this build") as caught:
            failing.push(second)
        assert caught.value.code.name == "UNAVAILABLE"
        assert client.get_weights().version == 1 and greedy(client) == said
        failing.push(second)
        assert client.get_weights().version == 2 and greedy(client) != said
        said = greedy(client)

        (tmp_path / "failures").write_text("xx")  # the old version cannot be put back either
        with pytest.raises(RpcFailed):
            failing.push(first)
    assert failing.process
    assert failing.process.popen.wait(60) == CRASHED
    assert "has to be restarted" in failing.process.said().splitlines()[-1]
    failing.start()
    with Client(failing.address) as client:
        assert client.get_weights().version == 2 and greedy(client) == said
