"""Going back to a kept version: under a new number, to the bit, through restarts and failures."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ibtree.client import RpcFailed
from ibtree.errors import FieldError, PreconditionError
from server_ext.errors import EngineError
from tests.ibtree.cli.command import ibtpo
from tests.server_ext.site import Site
from tests.server_ext.versions import Served, Version, delta_of, tensors, version_of
from tests.server_ext.weights.test_updater import LIFE, watched


@pytest.fixture
def served(tmp_path) -> Served:
    return Served(tmp_path, keep=4)


@pytest.fixture
async def four(served) -> list[Version]:
    """Versions 3 to 6: whole, delta, delta, whole."""
    versions = [await served.push(3)]
    for number in (4, 5):
        versions.append(await served.push_delta(versions[-1], number))
    return [*versions, await served.push(6)]


def numbers(served: Served) -> list[int]:
    return [stored.version for stored in served.updater.retained]


@pytest.mark.parametrize("to", [3, 4, 5])
async def test_any_kept_version_serves_again_as_the_next_one(served, four, to):
    states = watched(served)
    outcome = await served.updater.rollback(to)
    assert (outcome.version, outcome.restored_version) == (7, to)
    assert outcome.digest == four[to - 3].manifest.digest == served.updater.serving.digest
    assert outcome.pause_s > 0
    assert states == [state for state in LIFE if state != "received"]
    served.check(7, four[to - 3])
    assert numbers(served) == [4, 5, 6, 7]
    assert [stored.restored_version for stored in served.updater.retained] == [None, None, None, to]
    await served.restart()
    served.check(7, four[to - 3])


async def test_by_default_the_newest_that_differs(served, four):
    assert (await served.updater.rollback()).restored_version == 5
    assert (await served.updater.rollback()).restored_version == 6
    assert (await served.updater.rollback()).restored_version == 7
    served.check(9, four[2])
    assert numbers(served) == [6, 7, 8, 9]
    await served.restart()
    served.check(9, four[2])


async def test_versions_go_on_from_there(served, four):
    """A delta on the restored version, by its new number; the old numbers are gone."""
    await served.updater.rollback(5)
    restored = replace(four[2], manifest=four[2].but(version=7))
    for number in (6, 7):
        again = version_of(served.folder, number)
        with pytest.raises(PreconditionError, match="not newer than the served 7"):
            await served.updater.push(again.manifest, again.source())
    old = delta_of(served.folder, four[2], 8)
    with pytest.raises(PreconditionError, match=r"builds on version 5 .* holds version 7"):
        await served.updater.push(old.manifest, old.source())
    version = await served.push_delta(restored, 8)
    served.check(8, version)
    await served.restart()
    served.check(8, version)


@pytest.mark.parametrize("to", [0, 1, 2, 6, 7])
async def test_what_is_not_kept_or_serves_already_is_refused(served, four, to):
    states = watched(served)
    with pytest.raises(PreconditionError, match=f"no other version {to} is kept; .* 3, 4, 5"):
        await served.updater.rollback(to)
    served.check(6)
    assert not states
    await served.push(7)
    served.check(7)


async def test_nothing_to_go_back_to(served):
    for _ in range(2):
        with pytest.raises(PreconditionError, match=r"no version is kept; .* none"):
            await served.updater.rollback()
        await served.push(served.updater.serving.version + 1, tensors(1))


async def test_a_rollback_that_fails_half_way_puts_the_served_version_back(served, four):
    served.engine.faults.append(EngineError("half-way"))
    with pytest.raises(EngineError, match="half-way"):
        await served.updater.rollback(4)
    served.check(6)
    assert served.updater.state == "rejected"
    assert numbers(served) == [3, 4, 5, 6]
    version = await served.push_delta(four[3], 7)
    served.check(7, version)


async def test_a_damaged_file_is_not_gone_back_to(served, four):
    data = bytearray(served.stored(3).read_bytes())
    data[-1] ^= 1
    served.stored(3).write_bytes(data)
    for to in (3, 4, 5):  # it is what the deltas build on, too
        with pytest.raises(FieldError, match="damaged"):
            await served.updater.rollback(to)
        served.check(6)
        assert served.engine.updates == [3, 4, 5, 6]
    version = await served.push_delta(four[3], 7)
    served.check(7, version)


async def test_the_commands(tmp_path):
    async with Site(tmp_path) as site:
        server = ("--server", site.target)
        code, out, err = await ibtpo("weights", "rollback", *server)
        assert (code, out) == (1, "") and "no version is kept" in err and err.count("\n") == 1
        base = version_of(tmp_path, 1)
        delta = delta_of(tmp_path, base, 2)
        for version in (base, delta):
            await site.client.push_weights(version.manifest, version.path)

        code, out, err = await ibtpo("weights", "status", *server, "--json")
        assert (code, err) == (0, "")
        status = json.loads(out)
        assert (status["version"], status["digest"]) == (2, delta.manifest.digest.hex())
        assert status["file_bytes"] == delta.path.stat().st_size
        assert status["pause_s"] > 0 and 0 <= status["age_s"] < 60 and status["state"] == "serving"
        assert [stored["base_version"] for stored in status["kept"]] == [None, 1]
        code, table, err = await ibtpo("weights", *server)
        assert (code, err) == (0, "")
        assert delta.manifest.digest.hex()[:12] in table and "on 1" in table

        code, out, err = await ibtpo("weights", "rollback", "--to=1", *server, "--json")
        assert (code, err) == (0, "")
        outcome = json.loads(out)
        assert (outcome["version"], outcome["restored_version"]) == (3, 1)
        site.weights.check(3, base)
        assert "version 1 again" in (await ibtpo("weights", *server)).out
        for words in (["--to=9"], ["--to=3"]):
            code, out, err = await ibtpo("weights", "rollback", *words, *server)
            assert (code, out) == (1, "") and "is kept" in err
        for words in (["rollback", "--to=-1"], ["--to=1"], ["rollback", "--to=x"], ["forward"]):
            code, out, err = await ibtpo("weights", *words, *server)
            assert (code, out) == (1, "") and err.count("\n") == 1
        site.weights.check(3, base)
        with pytest.raises(RpcFailed, match="kept"):
            await site.client.rollback_weights(2**63)
