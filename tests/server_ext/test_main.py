"""How `ibtpo-server` ends: what a supervisor has to know."""

from __future__ import annotations

import pytest

from ibtree.errors import FieldError
from server_ext import __main__ as main
from server_ext.errors import MixedWeightsError
from server_ext.supervisor import CRASHED, REFUSED


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (MixedWeightsError("half a version"), CRASHED, "ibtpo-server: half a version"),
        (FieldError("data_dir", "is full", "another"), REFUSED[0], "ibtpo-server: --data-dir"),
    ],
)
def test_what_needs_a_restart_is_told_apart(monkeypatch, capsys, error, status, says):
    async def serve(*_: object) -> None:
        raise error

    monkeypatch.setattr("server_ext.app.serve", serve)
    with pytest.raises(SystemExit) as ended:
        main._serve(["--model=m", "--device=cpu", "--no-supervise"])
    assert ended.value.code == status
    assert capsys.readouterr().err.splitlines()[-1].startswith(says)
