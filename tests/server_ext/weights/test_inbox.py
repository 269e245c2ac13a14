"""The file of a push in progress: its room on the disk, and what it is written over."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import grpc
import pytest

from ibtree.client import RpcFailed
from server_ext.weights import inbox
from server_ext.weights.inbox import Inbox
from tests.server_ext.site import Site
from tests.server_ext.versions import Served, delta_of, version_of


def inode(path: Path) -> int:
    return path.stat().st_ino


@pytest.fixture
def spare(served: Served) -> Path:
    return served.store.spare


async def test_the_file_of_a_dropped_version_is_written_over(served, spare):
    """Two are kept; what the third drops takes the fourth, and so on."""
    for number in (1, 2):
        await served.push(number)
    dropped = inode(served.stored(1))
    await served.push(3)
    await served.updater._tidying
    assert inode(spare) == dropped
    await served.push(4)
    assert inode(served.stored(4)) == dropped
    served.check(4)
    await served.updater._tidying
    assert served.files() == {"3.safetensors", "4.safetensors", "serving.json", "spare.part"}
    await served.restart()
    served.check(4)
    await served.push(5)
    served.check(5)


@pytest.mark.parametrize("ratio", [0.4, 0.5, 1.0, 2.0, 2.5])
async def test_a_spare_of_like_size_is_used_and_leaves_nothing_of_its_own(served, spare, ratio):
    version = version_of(served.folder, 1)
    size = version.manifest.file_bytes
    spare.write_bytes(b"x" * round(size * ratio))
    before = inode(spare)
    await served.updater.push(version.manifest, version.source())
    assert served.stored(1).read_bytes() == version.path.read_bytes()
    assert (inode(served.stored(1)) == before) == (0.5 <= ratio <= 2.0) == (not spare.exists())


async def test_a_delta_leaves_a_large_spare_alone(served, spare):
    base = await served.push(1)
    spare.write_bytes(b"x" * 100_000)
    await served.push_delta(base, 2)
    assert spare.exists()
    served.check(2, delta_of(served.folder, base, 2))


async def test_a_broken_push_goes_on_in_the_file_it_began(tmp_path):
    version = version_of(tmp_path, 1)
    box, asked = Inbox(tmp_path, tmp_path / "spare", 60.0), []
    (tmp_path / "spare").write_bytes(b"x" * version.manifest.file_bytes)

    async def broken(start: int):
        asked.append(start)
        yield version.path.read_bytes()[:100]
        raise ConnectionError

    async def rest(start: int):
        asked.append(start)
        yield version.path.read_bytes()[start:]

    with pytest.raises(ConnectionError):
        await box.receive(version.manifest, broken)
    path = await box.receive(version.manifest, rest)
    assert asked == [0, 100]
    assert path.read_bytes() == version.path.read_bytes()


async def test_a_file_that_vanished_is_begun_anew(tmp_path):
    version = version_of(tmp_path, 1)
    box = Inbox(tmp_path, tmp_path / "spare", 60.0)

    async def broken(start: int):
        yield version.path.read_bytes()[:100]
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await box.receive(version.manifest, broken)
    (part,) = tmp_path.glob("*.part")
    part.unlink()
    path = await box.receive(version.manifest, version.source())
    assert path.read_bytes() == version.path.read_bytes()


def full_unless(free, monkeypatch) -> None:
    """Room on the disk is refused until `free()`."""
    allocate = os.posix_fallocate

    def checked(*arguments: int) -> None:
        if not free():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", checked)


async def test_a_spare_is_given_up_where_the_disk_is_short(served, spare, monkeypatch):
    version = version_of(served.folder, 1)
    spare.write_bytes(b"x" * 10 * version.manifest.file_bytes)
    full_unless(lambda: not spare.exists(), monkeypatch)
    await served.updater.push(version.manifest, version.source())
    served.check(1)


async def test_a_disk_that_fills_up_on_the_way_leaves_no_file(served, monkeypatch):
    """The disk is one where files that are written over take new blocks."""
    version = version_of(served.folder, 1)
    with monkeypatch.context() as patched:
        patched.setattr(inbox, "_allocate", lambda path, _: path.symlink_to("/dev/full"))
        with pytest.raises(OSError, match="No space left"):
            await served.updater.push(version.manifest, version.source())
    assert served.files() == {"serving.json"}
    await served.updater.push(version.manifest, version.source())
    served.check(1)


async def test_a_full_disk_is_told_and_the_next_push_works(tmp_path, monkeypatch):
    async with Site(tmp_path) as site:
        version = version_of(tmp_path, 1)
        with monkeypatch.context() as patched:
            full_unless(lambda: False, patched)
            with pytest.raises(RpcFailed, match="disk is full") as failed:
                await site.client.push_weights(version.manifest, version.path)
        assert failed.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert site.weights.files() == {"serving.json"}
        site.weights.check(0)
        await site.client.push_weights(version.manifest, version.path)
        site.weights.check(1)
