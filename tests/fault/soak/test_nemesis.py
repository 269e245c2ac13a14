"""The nemesis has every fault, and its small disk is really full."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.fault.soak.coverage import Fault
from tests.fault.soak.disk import SmallDisk
from tests.fault.soak.nemesis import INJECTIONS

SIZE_BYTES = 4 * 1024**2


def test_every_fault_can_be_injected() -> None:
    assert set(INJECTIONS) == set(Fault)


def test_a_full_disk_takes_nothing_until_it_is_freed(tmp_path: Path) -> None:
    with SmallDisk(tmp_path / "disk", SIZE_BYTES) as disk:
        if disk.problem:
            pytest.skip(f"no tmpfs can be mounted: {disk.problem}")
        file = disk.path / "file"
        file.write_bytes(bytes(SIZE_BYTES // 2))
        disk.fill()
        with pytest.raises(OSError) as caught:
            (disk.path / "more").write_bytes(b"one page at least")
        assert caught.value.errno == errno.ENOSPC
        disk.free()
        (disk.path / "more").write_bytes(bytes(SIZE_BYTES // 4))
    assert not file.exists()


def test_without_the_right_to_mount_it_is_a_folder_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with SmallDisk(tmp_path / "disk", SIZE_BYTES) as disk:
        assert "mount" in disk.problem
        (disk.path / "file").write_bytes(b"kept")
    assert (tmp_path / "disk" / "file").exists()
