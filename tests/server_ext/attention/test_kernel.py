"""The kernel's library: where it is built, by several processes at once, and without a compiler."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from server_ext.attention import kernel

BUILD = (
    "import sys; from server_ext.attention import kernel;"
    "kernel.FLAGS = ('-O0', *kernel.FLAGS[1:]); kernel.library() or sys.exit(1)"
)


@pytest.fixture
def anew():
    kernel.library.cache_clear()
    yield
    kernel.library.cache_clear()


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """An empty cache folder and an empty folder for temporary files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "cache" / "ibtpo", tmp_path / "temporary" / f"ibtpo-{os.getuid()}"


def test_processes_that_build_at_once(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", BUILD], env=environment) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    [library] = (tmp_path / "ibtpo").iterdir()
    before = library.stat().st_mtime_ns
    assert subprocess.run([sys.executable, "-c", BUILD], env=environment).returncode == 0
    assert library.stat().st_mtime_ns == before


def test_it_shares_torchs_openmp():
    """Another one's threads would spin against torch's; other wheels load copies too."""
    openmp = kernel._loaded_openmp()
    assert openmp is not None and "torch" in str(openmp)
    listed = subprocess.run(["ldd", kernel._built()], capture_output=True, text=True).stdout
    assert [line for line in listed.splitlines() if "omp" in line.split()[0]]
    check = (
        "import torch; from server_ext.attention import kernel; kernel.library();"
        "print(*{p.split()[-1] for p in open('/proc/self/maps') if 'omp' in p}, sep='\\n')"
    )
    loaded = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stdout
    assert loaded.split() == [str(openmp)]


def test_no_folder_in_the_cache(anew, folders, monkeypatch):
    cache, temporary = folders
    cache.parent.write_text("a file is in the way")
    built: list[Path] = []
    monkeypatch.setattr(kernel, "_build", lambda *args: built.append(args[-1]) or args[-1].touch())
    assert kernel._built().parent == temporary
    assert len(built) == 1
    assert stat.S_IMODE(temporary.stat().st_mode) == 0o700


def test_a_folder_of_someone_else_is_not_used(anew, folders, monkeypatch):
    """Anybody can make a folder for temporary files, with a library in it."""
    cache, temporary = folders
    cache.parent.write_text("a file is in the way")
    temporary.mkdir()
    temporary.chmod(0o777)
    monkeypatch.setattr(kernel, "_build", lambda *args: args[-1].touch())
    with pytest.raises(OSError, match="no folder"):
        kernel._built()


@pytest.mark.parametrize("trouble", ["no compiler", "an error"])
def test_without_a_compiler_one_line_says_so(anew, folders, monkeypatch, caplog, trouble):
    if trouble == "no compiler":
        monkeypatch.setattr(kernel.shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(kernel, "FLAGS", ("--no-such-option",))
    with caplog.at_level(logging.WARNING):
        assert kernel.library() is None and kernel.library() is None
    [record] = caplog.records
    assert "can not be built" in record.getMessage()
    from server_ext.attention import paged

    x = torch.zeros(1, 1, 1)
    assert not paged.takes(x, x, x)
