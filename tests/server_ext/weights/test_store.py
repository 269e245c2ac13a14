"""The weight versions on disk: the pointer, what is kept, crashes at every step."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest

from ibtree.errors import FieldError
from server_ext.weights.store import Serving, StoredWeights, WeightStore
from tests.server_ext.versions import MODEL_ID, Served, Version, version_of

DIGEST = bytes(range(32))


@pytest.fixture
def store(tmp_path) -> WeightStore:
    return WeightStore(tmp_path / "deep" / "weights", MODEL_ID, keep=3)


def reopened(store: WeightStore, model_id: str = MODEL_ID) -> WeightStore:
    return WeightStore(store.staging.parent, model_id, keep=3)


def put(store: WeightStore, version: int, *, serve: bool = True, delta: bool = False) -> None:
    store.staging.write_bytes(b"version %d" % version)
    files = store.keep(version, delta=delta)
    if serve:
        store.serve(StoredWeights(version, DIGEST, 9, 1.5, files=files))
        store.drop()


def versions(store: WeightStore) -> list[int]:
    return [stored.version for stored in store.retained]


def files(store: WeightStore) -> set[str]:
    return {path.name for path in store.staging.parent.iterdir()}


def test_nothing_served_is_version_0(store):
    assert store.serving() == reopened(store).serving() == Serving(0, b"")


def test_a_version_is_kept_and_served_across_re_opening(store):
    put(store, 3)
    again = reopened(store)
    assert again.serving() == Serving(3, DIGEST)
    assert again.retained == store.retained and again.retained[0].served_at_s == 1.5
    assert [path.read_bytes() for path in again.files(again.retained[0])] == [b"version 3"]
    assert files(again) == {"3.safetensors", "serving.json"}


def test_a_push_in_progress_is_dropped_when_opened(store):
    put(store, 3)
    store.staging.write_bytes(b"half")
    assert files(reopened(store)) == {"3.safetensors", "serving.json"}


def test_another_model_is_refused_and_changes_nothing(store):
    put(store, 3)
    with pytest.raises(FieldError, match=r"keeps weights of model .* --model is another"):
        reopened(store, "another")
    assert reopened(store).serving() == Serving(3, DIGEST)


def test_some_versions_are_kept_and_older_ones_are_dropped(store):
    for version in (1, 2, 5, 9, 11):
        put(store, version)
    assert versions(store) == versions(reopened(store)) == [5, 9, 11]
    left = {*(f"{n}.safetensors" for n in (5, 9, 11)), "serving.json", "spare.part"}
    assert files(store) == files(reopened(store)) == left


def test_what_deltas_build_on_stays_as_long_as_they_do(store):
    put(store, 1)
    for version in (2, 3, 4, 5):
        put(store, version, delta=True)
    assert versions(store) == [3, 4, 5]
    chain = ["1.safetensors", *(f"{n}.delta.safetensors" for n in (2, 3, 4, 5))]
    assert [path.name for path in store.files(store.retained[-1])] == chain
    assert files(store) == {*chain, "serving.json"}
    for version in (6, 7, 8):
        put(store, version)
    assert files(store) == {*(f"{n}.safetensors" for n in (6, 7, 8)), "serving.json", "spare.part"}


def test_chains_do_not_grow_for_ever(store):
    assert not store.takes_delta()
    put(store, 1)
    for version in range(2, 9):
        assert store.takes_delta()
        put(store, version, delta=True)
    assert not store.takes_delta()


@pytest.mark.parametrize("others", [[3], [8, 9], [1, 8, 9], [3, 5], [3, 4, 5, 6]])
def test_the_served_version_is_never_dropped(store, others):
    """Beside newer ones: staged and never applied, or of another model's longer run."""
    for version in others:
        put(store, version, serve=False)
    put(store, 2)
    assert reopened(store).serving() == Serving(2, DIGEST)
    assert files(store) == {"2.safetensors", "serving.json", "spare.part"}


def test_a_foreign_file_stays_and_does_not_stop_it(store):
    (store.staging.parent / "backup.safetensors").write_bytes(b"")
    put(store, 1)
    assert reopened(store).serving() == Serving(1, DIGEST)
    assert "backup.safetensors" in files(store)


@pytest.mark.parametrize("link", ["hard", "symbolic"])
def test_a_file_that_somebody_else_has_too_is_never_written_over(store, tmp_path, link):
    put(store, 1)
    stored, backup = store.files(store.retained[0])[0], tmp_path / "backup"
    if link == "hard":
        backup.hardlink_to(stored)
    else:
        stored.rename(backup)
        stored.symlink_to(backup)
    for version in (2, 3, 4):
        put(store, version)
    assert not stored.exists() and not store.spare.exists()
    assert backup.read_bytes() == b"version 1"


def test_going_back_to_what_was_kept_before(store):
    for version in (1, 2):
        put(store, version)
    before = store.retained
    put(store, 3)
    store.put_back(before)
    assert versions(store) == versions(reopened(store)) == [1, 2]
    store.put_back(())
    assert reopened(store).serving() == Serving()


class Crash(BaseException):
    """The process dies here."""


class Fuse:
    """Replaces the calls that touch the disk; the one at `at` raises instead of being made."""

    def __init__(self, monkeypatch, at: int, error: type[BaseException]) -> None:
        self.calls, self.at, self.error = 0, at, error
        calls = [(Path, name) for name in ("rename", "replace", "unlink")]
        for owner, name in [*calls, (os, "fsync"), (json, "dump")]:
            monkeypatch.setattr(owner, name, self.wrapped(getattr(owner, name)))

    def wrapped(self, call):
        def burn(*args, **kwargs):
            if self.error is Crash and self.calls > self.at:
                raise Crash  # dead is dead
            self.calls += 1
            if self.calls == self.at + 1:
                raise self.error
            return call(*args, **kwargs)

        return burn


DISK_CALLS = 13  # two to begin, four to keep a version, four to serve it, three to tidy up


@pytest.mark.parametrize("at", range(DISK_CALLS + 1))
async def test_a_crash_anywhere_leaves_exactly_the_old_or_the_new_version(served, at, monkeypatch):
    """A whole push goes over the file of a dropped one; the new process then takes it again."""
    version = await with_a_spare(served)
    with monkeypatch.context() as patched:
        fuse = Fuse(patched, at, Crash)
        with suppress(Crash):
            await served.updater.push(version.manifest, version.source())
        with suppress(Crash):
            if served.updater._tidying:
                await served.updater._tidying
        assert fuse.calls == min(at + 1, DISK_CALLS)
    await served.restart()
    assert served.updater.serving.version == (3 if at <= 8 else 4)
    served.check(served.updater.serving.version)
    await served.updater.push(version.manifest, version.source())
    served.check(4)
    await served.restart()
    served.check(4)


async def with_a_spare(served: Served) -> Version:
    """Version 3 serves, 1 was dropped; returns version 4."""
    for number in (1, 2, 3):
        await served.push(number)
    await served.updater._tidying
    assert served.store.spare.exists()
    return version_of(served.folder, 4)


@pytest.mark.parametrize("at", range(DISK_CALLS))
async def test_a_failing_disk_call_leaves_engine_and_disk_of_one_mind(served, at, monkeypatch):
    """The process lives on; whatever it says it serves is what a restart serves."""
    version = await with_a_spare(served)
    with monkeypatch.context() as patched:
        Fuse(patched, at, OSError)
        with suppress(OSError):
            await served.updater.push(version.manifest, version.source())
    number = served.updater.serving.version
    served.check(number)
    assert served.updater.state == ("serving" if number == 4 else "rejected")
    await served.restart()
    served.check(number)


@pytest.mark.parametrize("damage", ["missing", "cut", "bit", "other version"])
async def test_a_damaged_served_version_is_refused_at_the_start(served, damage):
    await served.push(1)
    await served.push(2)
    path = served.stored(2)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "bit":
        path.write_bytes(data)
    else:
        path.write_bytes(served.stored(1).read_bytes())
    with pytest.raises(FieldError) as caught:
        await served.restart()
    assert caught.value.field in ("data_dir", "weights")


@pytest.mark.parametrize(
    "content", ["", "[]", '{"version": 1}', '{"model_id": "m", "kept": [{}]}', '{"kept": []}']
)
async def test_a_damaged_pointer_is_refused_with_its_field(served, content):
    await served.push(1)
    (served.folder / "weights" / "serving.json").write_text(content)
    with pytest.raises(FieldError) as caught:
        await served.restart()
    assert caught.value.field == "data_dir"
