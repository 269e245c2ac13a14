"""What a wheel brings, and what version it says it is."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ibtree
from tests import ROOT

PACKED = ("ibtree", "ibtpo_settings", "server_ext", "learner", "protos")
FILES = ("pyproject.toml", "README.md", "LICENSE", "ibtpo_torchvision.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy: a build leaves files in its source."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in PACKED:
        without = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=without)
    for name in FILES:
        shutil.copy(ROOT / name, source)
    line = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*line, "-w", out, source], check=True, capture_output=True)
    (path,) = out.iterdir()
    return zipfile.ZipFile(path)


def test_the_protos_are_in_it_below_one_include_path(wheel: zipfile.ZipFile) -> None:
    protos = sorted((ROOT / "protos").rglob("*.proto"))
    assert protos
    for path in protos:
        inside = f"ibtree/protos/{path.relative_to(ROOT / 'protos')}"
        assert wheel.read(inside) == path.read_bytes()


def test_the_version_is_the_packages(wheel: zipfile.ZipFile) -> None:
    assert wheel.filename and f"ibtpo-{ibtree.__version__}-" in Path(wheel.filename).name


@pytest.mark.parametrize(
    ("module", "prog"),
    [
        ("server_ext.__main__", "ibtpo-server"),
        ("learner.__main__", "ibtpo-learner"),
        ("ibtree.cli", "ibtpo"),
    ],
)
def test_every_command_says_it(module: str, prog: str) -> None:
    code = f"import sys; sys.argv[0] = {prog!r}; from {module} import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"{prog} {ibtree.__version__}\n")
