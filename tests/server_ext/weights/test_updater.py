"""The life of a pushed weight version, and every push that is refused."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest
import torch

from ibtree.errors import FieldError, PreconditionError
from ibtree.messages import PushOutcome
from ibtree.weights.manifest import TensorSpec
from server_ext.errors import PushEndedError
from server_ext.weights.store import Serving
from server_ext.weights.updater import WeightState
from tests.server_ext.versions import MODEL_ID, Served, Version, tensors, version_of

LIFE = ["announced", "received", "verified", "staged", "applied", "serving"]


def watched(served: Served) -> list[str]:
    """States as they are entered."""
    states: list[str] = []
    enter = served.updater._enter

    def note(state, manifest) -> None:
        enter(state, manifest)
        states.append(state)

    served.updater._enter = note
    return states


async def refused(served: Served, manifest, source, error: type[Exception], words: str) -> None:
    """The push fails, says why, and changes nothing."""
    before, updates = served.updater.serving, len(served.engine.updates)
    with pytest.raises(error, match=words):
        await served.updater.push(manifest, source)
    served.check(before.version)
    assert served.updater.serving == before
    assert served.store.serving() == before
    assert len(served.engine.updates) == updates
    assert served.updater.state is WeightState.REJECTED


@pytest.fixture
async def at_3(served) -> Served:
    await served.push(3)
    return served


async def test_the_drawn_life(served):
    states = watched(served)
    served.check(0)
    version = version_of(served.folder, 1)
    outcome = await served.updater.push(version.manifest, version.source())
    assert states == LIFE
    assert outcome == PushOutcome(1, "serving", version.manifest.digest, outcome.pause_s)
    assert outcome.pause_s > 0
    served.check(1)
    assert served.updater.serving == Serving(1, version.manifest.digest) == served.store.serving()
    assert served.files() == {"1.safetensors", "serving.json"}
    await served.push(2)
    await served.push(7)
    served.check(7)
    await served.restart()
    served.check(7)


async def test_a_restart_without_a_push_loads_nothing(served):
    await served.restart()
    served.check(0)
    assert served.engine.updates == []


@pytest.mark.parametrize("pushed", [True, False])
async def test_another_model_is_refused_at_the_start_and_takes_nothing(served, pushed):
    """It would drop the first one's versions; whether there are any yet or not."""
    if pushed:
        await served.push(3)
    files = served.files()
    with pytest.raises(FieldError, match=r"keeps weights of model mmmmmm.*another folder") as error:
        await served.restart(model_id="x" * 64)
    assert error.value.field == "data_dir" and served.files() == files
    await served.restart(model_id=MODEL_ID)
    served.check(3 if pushed else 0)


@pytest.mark.parametrize("size", [1, 7, 10**6])
async def test_chunks_of_any_size(served, size):
    version = version_of(served.folder, 1)
    await served.updater.push(version.manifest, version.source(size))
    served.check(1)


async def test_the_served_version_again_is_a_no_op(at_3):
    states = watched(at_3)
    version = version_of(at_3.folder, 3)
    outcome = await at_3.updater.push(version.manifest, version.source())
    assert outcome == PushOutcome(3, "serving", version.manifest.digest, 0.0)
    assert states == []
    assert at_3.engine.updates == [3]


@pytest.mark.parametrize("number", [0, 1, 2, 3])
async def test_a_version_that_is_not_newer_is_refused(at_3, number):
    version = version_of(at_3.folder, number, tensors(99))
    words = f"version: {number} is not newer than the served 3"
    await refused(at_3, version.manifest, version.source(), PreconditionError, words)


async def test_another_model_is_refused(at_3):
    version = version_of(at_3.folder, 4)
    manifest = version.but(model_id="x" * 64)
    await refused(at_3, manifest, version.source(), PreconditionError, "model_id")


def renamed(content):
    content["model.z"] = content.pop("model.b")


def retyped(content):
    content["model.b"] = content["model.b"].to(torch.bfloat16)


CONTENTS = {
    "missing": (lambda c: c.pop("model.b"), "'model.b' is missing"),
    "extra": (lambda c: c.update(z=torch.ones(1)), "'z' is not in the model"),
    "renamed": (renamed, "'model.(b|z)'"),
    "shape": (lambda c: c.update({"model.b": torch.ones(2, 2)}), r"'model.b' has shape \[2, 2\]"),
    "dtype": (retyped, "'model.b' has dtype BF16, the server takes F32"),
    "empty": (lambda c: c.clear(), "'model.a' is missing"),
}


@pytest.mark.parametrize("name", CONTENTS)
async def test_tensors_that_do_not_fit_are_refused(at_3, name):
    change, words = CONTENTS[name]
    content = tensors(4)
    change(content)
    version = version_of(at_3.folder, 4, content)
    await refused(at_3, version.manifest, version.source(), PreconditionError, f"tensors: {words}")


async def test_a_name_that_stands_twice_is_refused(at_3):
    version = version_of(at_3.folder, 4)
    twice = version.but(tensors=(*version.manifest.tensors, version.manifest.tensors[0]))
    await refused(at_3, twice, version.source(), PreconditionError, "twice")


def specs(version: Version, **changes: object) -> tuple[TensorSpec, ...]:
    first, *rest = version.manifest.tensors
    return (replace(first, **changes), *rest)


@pytest.mark.parametrize("sha256", [bytes(32), b"", b"x"])
async def test_a_wrong_digest_is_refused(at_3, sha256):
    version = version_of(at_3.folder, 4)
    manifest = version.but(tensors=specs(version, sha256=sha256))
    words = "weights: wrong digest of model.a"
    await refused(at_3, manifest, version.source(), FieldError, words)


@pytest.mark.parametrize("name", ["missing", "extra", "renamed", "shape", "dtype"])
async def test_a_file_that_holds_other_tensors_than_announced_is_refused(at_3, name):
    content = tensors(4)
    CONTENTS[name][0](content)
    other = version_of(at_3.folder, 5, content)
    size = other.path.stat().st_size
    manifest = version_of(at_3.folder, 4).but(file_bytes=size)
    await refused(at_3, manifest, other.source(), FieldError, "weights|file_bytes")


@pytest.mark.parametrize("by", [-(10**6), -1, 1, 10**6])
async def test_a_stream_of_another_length_than_announced_is_refused(at_3, by):
    version = version_of(at_3.folder, 4)
    manifest = version.but(file_bytes=version.manifest.file_bytes + by)
    await refused(at_3, manifest, version.source(), FieldError, "file_bytes|chunk")


async def test_an_endless_stream_is_refused_at_the_announced_size(at_3):
    version, sent = version_of(at_3.folder, 4), []

    async def endless(start: int):
        while True:
            sent.append(100)
            yield bytes(100)

    await refused(at_3, version.manifest, endless, FieldError, "chunk: more than")
    assert sum(sent) < version.manifest.file_bytes + 200


@pytest.mark.parametrize("size", [-1, 0, 60, 2**62])
async def test_an_absurd_size_is_refused_before_a_byte_is_taken(at_3, size):
    async def none_taken(start: int):
        raise AssertionError("a byte was taken")
        yield b""

    manifest = version_of(at_3.folder, 4).but(file_bytes=size)
    await refused(at_3, manifest, none_taken, FieldError, "manifest.file_bytes")


@pytest.mark.parametrize("number", [4 + 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1])
async def test_a_version_that_leaves_no_numbers_is_refused(at_3, number):
    """Once it serves no smaller one is taken, and trees carry versions below 2^63."""
    version = version_of(at_3.folder, number)
    words = rf"manifest.version: got {number}; allowed: 4 to {3 + 2**32}"
    await refused(at_3, version.manifest, version.source(), FieldError, words)
    await at_3.push(3 + 2**32)
    await at_3.push(4 + 2**32)
    at_3.check(4 + 2**32)


@pytest.mark.parametrize("last", [2**63 - 2, 2**63 - 1])
async def test_the_end_of_the_numbers(served, last):
    """A folder that a server without this bound left: what is served can be read, nothing is put
    beyond it."""
    await served.push(1)
    await served.push(2)
    first, second = served.store.retained
    served.store.put_back((first, replace(second, version=last)))
    await served.restart()
    served.check(last, tensors(2))
    if last == 2**63 - 2:
        assert (await served.updater.rollback(1)).version == 2**63 - 1
        served.check(2**63 - 1, tensors(1))
    else:
        with pytest.raises(PreconditionError, match="no number is left"):
            await served.updater.rollback(1)
        served.check(last, tensors(2))
    with pytest.raises((FieldError, PreconditionError), match="version"):
        await served.push(2**63)


async def test_random_bit_flips_and_cuts_are_refused(at_3):
    version, rng = version_of(at_3.folder, 4), random.Random(0)
    whole = version.path.read_bytes()
    for _ in range(100):
        data = bytearray(whole)
        if rng.random() < 0.5:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            del data[rng.randrange(len(data)) :]
            if rng.random() < 0.5:  # cut, then filled up to the announced size
                data += rng.randbytes(len(whole) - len(data))
        version.path.write_bytes(data)
        await refused(at_3, version.manifest, version.source(), FieldError, "weights|chunk")
    version.path.write_bytes(whole)
    await at_3.updater.push(version.manifest, version.source())
    at_3.check(4)


async def test_a_stream_that_breaks_off_is_rejected(at_3):
    version = version_of(at_3.folder, 4)

    async def broken(start: int):
        async for chunk in version.source()(start):
            yield chunk
            raise ConnectionError("gone")

    await refused(at_3, version.manifest, broken, ConnectionError, "gone")
    await at_3.updater.push(version.manifest, version.source())
    at_3.check(4)


async def test_pushes_at_once(served):
    """The newest serves; an older one did before it, or was ended by it."""
    versions = [version_of(served.folder, n) for n in (1, 2, 3)]
    pushes = [served.updater.push(v.manifest, v.source(7)) for v in versions]
    outcomes = await asyncio.gather(*pushes, return_exceptions=True)
    taken = [o.version for o in outcomes if isinstance(o, PushOutcome)]
    assert all(isinstance(o, PushOutcome | PushEndedError) for o in outcomes)
    assert served.engine.updates == taken and taken[-1] == 3
    served.check(3)


async def test_two_learners_push_the_same_version(served):
    version = version_of(served.folder, 1)
    outcomes = await asyncio.gather(
        *(served.updater.push(version.manifest, version.source()) for _ in range(2))
    )
    assert outcomes[0].pause_s > 0 and outcomes[1].pause_s == 0.0
    assert served.engine.updates == [1]


def test_what_the_updater_says_of_itself(served):
    assert (served.updater.dtype, served.updater.model_id) == ("F32", MODEL_ID)
