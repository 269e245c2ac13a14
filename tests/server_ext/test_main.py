"""How `ibtpo-server` ends: what a supervisor has to know."""

from __future__ import annotations

import pytest

from ibtree.errors import FieldError
from server_ext import __main__ as main
from server_ext.errors import RESTART_STATUS, MixedWeightsError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MixedWeightsError("half a version"), RESTART_STATUS),
        (FieldError("data_dir", "is full", "another"), "ibtpo-server: --data-dir: is full"),
    ],
)
def test_what_needs_a_restart_is_told_apart(monkeypatch, capsys, error, code):
    async def serve(*_: object) -> None:
        raise error

    monkeypatch.setattr("server_ext.app.serve", serve)
    with pytest.raises(SystemExit) as ended:
        main._serve(["--model=m", "--device=cpu"])
    if code == RESTART_STATUS:
        assert ended.value.code == code
        assert capsys.readouterr().err.splitlines()[-1] == "ibtpo-server: half a version"
    else:
        assert str(ended.value.code).startswith(code)
