"""SIGKILL of the server in every state of a version, and of the learner while it sends one."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ibtree import Client
from ibtree.client import RpcFailed
from ibtree.errors import FieldError
from tests import ROOT
from tests.server_ext import versions
from tests.server_ext.site import Site
from tests.server_ext.versions import Served, Version, delta_of, tensors, version_of
from tests.server_ext.weights.test_updater import LIFE
from tests.server_ext.weights.weights_child import fingerprint

KILLS = 20 if os.environ.get("IBTPO_SOAK") else 3


class Child:
    """A server process that is killed at the end."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def said(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the server ended"
        return json.loads(line)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def started(module: str, *words: str) -> Iterator[Child]:
    command = [sys.executable, "-m", f"tests.server_ext.weights.{module}", *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        child = Child(process)
        try:
            yield child
        finally:
            child.kill()


async def served_before(folder: Path) -> Version:
    """A folder in which version 3 served, a delta on version 2, with a spare file to write over."""
    served = Served(folder)
    version = await served.push_delta(await served.push(2), 3)
    served.store.spare.write_bytes(b"x" * version.whole.stat().st_size)
    return version


def serves(said: dict[str, Any], version: Version) -> str:
    """It serves this version, to the bit; returns its address."""
    assert said["version"] == said["engine"] == version.manifest.version
    assert said["digest"] == version.manifest.digest.hex()
    assert said["weights"] == fingerprint(load_file(version.whole)), "of another version"
    return said["target"]


@pytest.mark.parametrize("state", LIFE)
async def test_the_server_killed_in_each_state(tmp_path, state):
    """Whole versions and deltas in turn; the next server takes up from what was served."""
    now = await served_before(tmp_path)
    for kill in range(KILLS):
        number = now.manifest.version + 1
        new = version_of(tmp_path, number) if kill % 2 else delta_of(tmp_path, now, number)
        with (
            started("weights_child", str(tmp_path), state) as server,
            Client(serves(server.said(), now), timeout_s=20) as client,
        ):
            push = asyncio.create_task(asyncio.to_thread(pushed, client, new))
            reached = await asyncio.to_thread(server.said)
            assert reached == {"state": state, "version": number}
            server.kill()
            with pytest.raises(RpcFailed):
                await push
        now = new if state == "serving" else now
    served = Served(tmp_path)
    await served.updater.restore()
    served.check(now.manifest.version, now)
    await served.push(99)
    served.check(99)


def pushed(client: Client, version: Version) -> int:
    return client.push_weights(version.manifest, version.path, timeout_s=20).version


async def test_the_server_killed_during_a_rollback(tmp_path):
    now = await served_before(tmp_path)
    with (
        started("weights_child", str(tmp_path), "applied") as server,
        Client(serves(server.said(), now), timeout_s=20) as client,
    ):
        back = asyncio.create_task(asyncio.to_thread(client.rollback_weights, 2, timeout_s=20))
        assert (await asyncio.to_thread(server.said))["version"] == 4
        server.kill()
        with pytest.raises(RpcFailed):
            await back
    served = Served(tmp_path)
    await served.updater.restore()
    served.check(3, now)
    assert (await served.updater.rollback(2)).version == 4
    served.check(4, tensors(2))


async def test_the_learner_killed_while_it_sends(tmp_path, monkeypatch):
    """Nothing changes, and the next push, by another process, goes on and serves. Each sends a few
    of the 220 chunks that are still missing."""
    monkeypatch.setitem(versions.SHAPES, "model.a", (300_000, 3))
    async with Site(tmp_path) as site:
        first, second = version_of(tmp_path, 3), version_of(tmp_path, 4)
        await site.client.push_weights(first.manifest, first.path)
        for kill in range(KILLS):
            words = [site.target, str(second.path), "4", "16384", str(5 + kill % 7)]
            with started("weights_pusher", *words) as pusher:
                await asyncio.to_thread(pusher.said)
                pusher.kill()
            async with asyncio.timeout(20):
                while (await site.client.get_weights()).state != "rejected":
                    await asyncio.sleep(0.01)
            site.weights.check(3)
        await site.client.push_weights(second.manifest, second.path)
        site.weights.check(4)


async def test_damage_on_the_disk_is_found_at_the_start(tmp_path):
    await served_before(tmp_path)
    for path in sorted((tmp_path / "weights").glob("*.safetensors")):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(FieldError):
            await Served(tmp_path).updater.restore()
        data[-1] ^= 1
        path.write_bytes(data)
    await Served(tmp_path).updater.restore()
