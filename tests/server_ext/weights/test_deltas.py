"""Deltas on the served version: exact results, only what changed, every refusal, restarts."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ibtree.errors import FieldError, PreconditionError
from server_ext.errors import EngineError
from tests.server_ext.versions import Served, Version, delta_of, tensors, version_of
from tests.server_ext.weights.test_updater import LIFE, refused, watched


@pytest.fixture
async def base(served) -> Version:
    return await served.push(3)


def loaded(served: Served) -> list[list[str]]:
    """Names that the engine is given, update by update."""
    updates: list[list[str]] = []
    load = served.engine.load

    async def note(changes, version) -> None:
        content = list(changes)
        updates.append([name for name, _ in content])
        await load(content, version)

    served.engine.load = note
    return updates


async def test_a_delta_serves_the_version_to_the_bit(served, base):
    states, names_loaded = watched(served), loaded(served)
    version = await served.push_delta(base, 4)
    assert states == LIFE
    served.check(4, version)
    assert names_loaded == [["model.a", "model.b"]], "only what changed goes to the engine"
    assert (
        served.updater.serving.digest
        == version_of(served.folder, 4, load_file(version.whole)).manifest.digest
    )
    newest = served.updater.retained[-1]
    assert (newest.version, newest.base_version) == (4, 3)
    assert newest.file_bytes == version.path.stat().st_size


async def test_many_in_a_row_then_a_restart(served, base):
    """Longer than a chain may get: some of them are written out whole."""
    version = base
    for number in range(4, 25):
        version = await served.push_delta(
            version, number, *random.Random(number).choices(list(tensors(0)), k=2)
        )
        served.check(number, version)
        assert len(served.updater.retained[-1].files) <= 8
        if number % 5 == 0:
            await served.restart()
            served.check(number, version)
    assert {stored.base_version is None for stored in served.updater.retained} <= {True, False}
    await served.restart()
    served.check(24, version)
    assert len(served.files()) <= 10


async def test_chains_end_in_a_whole_version(served, base):
    version, wholes = base, []
    for number in range(4, 21):
        version = await served.push_delta(version, number)
        if served.updater.retained[-1].base_version is None:
            wholes.append(number)
            assert served.stored(number).is_file()
    assert wholes == [11, 19]


async def test_a_whole_version_gives_the_engine_only_what_changed(served, base):
    names_loaded = loaded(served)
    content = tensors(3) | {"model.c": tensors(9)["model.c"]}
    await served.push(4, content)
    assert names_loaded == [["model.c"]]
    served.check(4, content)


async def test_a_version_of_the_same_tensors_takes_its_number(served, base):
    """A step without a gradient leads to one."""
    names_loaded = loaded(served)
    version = delta_of(served.folder, base, 4, "model.a")
    same = replace(
        version_of(served.folder, 4, tensors(3)).manifest,
        base_version=3,
        base_digest=base.manifest.digest,
    )
    save_file({}, version.path)
    same = replace(same, file_bytes=version.path.stat().st_size)
    await served.updater.push(same, version.source())
    assert [len(names) for names in names_loaded] == [1]
    served.check(4, tensors(3))


async def test_the_same_delta_again_is_a_no_op(served, base):
    version = await served.push_delta(base, 4)
    again = await served.updater.push(version.manifest, version.source())
    assert (again.version, again.pause_s) == (4, 0.0)
    assert served.engine.updates == [3, 4]


@pytest.mark.parametrize("change", ["version", "digest", "both", "zero"])
async def test_another_base_is_refused_and_the_one_here_is_named(served, base, change):
    version = delta_of(served.folder, base, 6)
    changes = {
        "version": {"base_version": 2},
        "digest": {"base_digest": bytes(32)},
        "both": {"base_version": 5, "base_digest": bytes(32)},
        "zero": {"base_version": 0, "base_digest": b""},
    }
    manifest = version.but(**changes[change])
    words = rf"base_version: .* holds version 3 \({base.manifest.digest.hex()[:12]}"
    await refused(served, manifest, version.source(), PreconditionError, words)
    await served.push(6)
    served.check(6)


@pytest.mark.parametrize("digest", [b"", bytes(32)])
async def test_no_delta_on_the_model_folder(served, digest):
    whole = version_of(served.folder, 1)
    manifest = whole.but(base_version=0, base_digest=digest)
    await refused(served, manifest, whole.source(), PreconditionError, "holds none; push a whole")


async def test_a_delta_on_a_version_served_before_is_refused(served, base):
    await served.push(4)
    version = delta_of(served.folder, base, 5)
    await refused(served, version.manifest, version.source(), PreconditionError, "holds version 4")


async def test_a_delta_after_a_restart(served, base):
    await served.restart()
    version = await served.push_delta(base, 4)
    served.check(4, version)


@pytest.mark.parametrize("name", ["model.a", "model.c"])
async def test_a_result_of_another_digest_is_refused(served, base, name):
    """The digest of a tensor that the file changes, and of one that it leaves as it is."""
    version = delta_of(served.folder, base, 4)
    wrong = tuple(
        replace(t, sha256=bytes(32)) if t.name == name else t for t in version.manifest.tensors
    )
    words = f"wrong digest of {name}"
    await refused(served, version.but(tensors=wrong), version.source(), FieldError, words)
    served.check(3)
    await served.updater.push(version.manifest, version.source())
    served.check(4, version)


FILES = {
    "a whole file": lambda v, base: v.whole.read_bytes(),
    "another tensor": lambda v, base: saved(v, z=torch.zeros(9, dtype=torch.uint8)),
    "values instead of records": lambda v, base: saved(v, **{"model.a": tensors(4)["model.a"]}),
    "no records": lambda v, base: saved(v, **{"model.a": torch.zeros(0, dtype=torch.uint8)}),
    "zeros": lambda v, base: saved(v, **{"model.a": torch.zeros(40, dtype=torch.uint8)}),
}


def saved(version: Version, **content: torch.Tensor) -> bytes:
    save_file(content, version.path)
    return version.path.read_bytes()


@pytest.mark.parametrize("name", FILES)
async def test_files_that_are_no_delta_of_these_tensors(served, base, name):
    version = delta_of(served.folder, base, 4)
    version.path.write_bytes(FILES[name](version, base))
    manifest = version.but(file_bytes=version.path.stat().st_size)
    await refused(served, manifest, version.source(), FieldError, "weights")
    version = await served.push_delta(base, 5)
    served.check(5, version)


async def test_an_update_that_fails_half_way_puts_the_old_version_back(served, base):
    version = await served.push_delta(base, 4)
    served.engine.faults.append(EngineError("half-way"))
    with pytest.raises(EngineError, match="half-way"):
        await served.push_delta(version, 5)
    served.check(4, version)
    after = await served.push_delta(version, 6)
    served.check(6, after)
    await served.restart()
    served.check(6, after)


async def test_a_disk_that_fails_after_the_copy_was_changed(served, base):
    keep = served.store.keep

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    served.store.keep = full
    with pytest.raises(OSError, match="No space"):
        await served.push_delta(base, 4)
    served.check(3)
    served.store.keep = keep
    version = await served.push_delta(base, 5)
    served.check(5, version)


async def test_without_a_copy_whole_versions_are_taken_and_deltas_are_not(served, base):
    """The served version's file was lost under a running server, and then an update failed."""
    data = served.stored(3).read_bytes()
    served.stored(3).unlink()
    version = delta_of(served.folder, base, 4)
    flipped = version.but(
        tensors=tuple(replace(t, sha256=bytes(32)) for t in version.manifest.tensors)
    )
    with pytest.raises(FieldError):
        await served.updater.push(flipped, version.source())
    served.check(3)
    await refused(served, version.manifest, version.source(), PreconditionError, "holds none")
    served.stored(3).write_bytes(data)
    await served.push(5)
    served.check(5)
