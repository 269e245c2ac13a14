"""The checked-in stubs are what the .proto files give, and every field says what it means."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests import ROOT

PROTOS = sorted((ROOT / "protos/ibtree/v1").glob("*.proto"))


def test_stubs_do_not_drift(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "protos/generate.py", tmp_path]
    subprocess.run(command, check=True)
    made = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    checked_in = {p.name: p.read_bytes() for p in (ROOT / "ibtree/wire/v1").glob("*_pb2*")}
    assert made == checked_in, "run `make protos`"


@pytest.mark.parametrize("path", PROTOS, ids=lambda p: p.stem)
def test_every_field_and_rpc_is_documented(path: Path) -> None:
    lines = [line.strip() for line in path.read_text().splitlines()]
    bare = []
    for before, line in pairwise(lines):
        field = " = " in line and not line.startswith(("//", "syntax"))
        obvious = "_UNSPECIFIED = 0" in line
        if (field or line.startswith(("rpc ", "service "))) and not obvious:
            bare += [line] if not before.startswith("//") else []
    assert not bare, f"{path.name}: no comment above {bare}"


@pytest.mark.parametrize("path", PROTOS, ids=lambda p: p.stem)
def test_names_follow_the_package(path: Path) -> None:
    text = path.read_text()
    assert "package ibtree.v1;" in text and 'syntax = "proto3";' in text
    for line in text.splitlines():
        if line.strip().startswith("rpc "):
            name = line.split("rpc ")[1].split("(")[0]
            assert f"{name}Request)" in line and f"{name}Response)" in line
