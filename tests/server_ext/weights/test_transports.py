"""Both ways for a file to the server, over gRPC, with one set of tests; then what is their own."""

from __future__ import annotations

import asyncio
import os
import random
from functools import partial
from pathlib import Path

import grpc
import pytest
import torch
from safetensors.torch import save_file

from ibtree import Client
from ibtree.client import RpcFailed
from ibtree.client.push import Exchange
from ibtree.messages import PushOutcome
from ibtree.weights.push import SharedFolderTransport, StreamTransport
from ibtree.weights.tensor_files import read_header
from ibtree.wire import calls
from server_ext.weights.inbox import Inbox
from tests.server_ext import versions
from tests.server_ext.fakes import until
from tests.server_ext.proxy import Proxy
from tests.server_ext.site import Site
from tests.server_ext.versions import Version, delta_of, version_of

INVALID = grpc.StatusCode.INVALID_ARGUMENT
REFUSED = grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture
async def site(tmp_path):
    (tmp_path / "shared").mkdir()
    async with Site(tmp_path, shared_dir=tmp_path / "shared") as site:
        yield site


class Way:
    """A transport of a client of its own, for an event loop."""

    def __init__(self, site: Site, kind: str) -> None:
        self.site, self.client = site, Client(site.target, timeout_s=20)
        shared = site.weights.folder / "shared"
        stream = StreamTransport(self.client)
        self.transport = stream if kind == "stream" else SharedFolderTransport(self.client, shared)

    async def push(self, version: Version) -> PushOutcome:
        push = partial(self.transport.push, version.manifest, version.path, timeout_s=20)
        return await asyncio.to_thread(push)

    async def refused(self, version: Version, code: grpc.StatusCode, words: str) -> None:
        """It says why, and changes nothing."""
        before = await self.site.client.get_weights()
        loaded = {name: tensor.clone() for name, tensor in self.site.engine.weights.items()}
        with pytest.raises(RpcFailed, match=words) as caught:
            await self.push(version)
        assert caught.value.code is code, str(caught.value)
        after = await self.site.client.get_weights()
        assert (after.version, after.digest, after.kept) == (
            before.version,
            before.digest,
            before.kept,
        )
        for name, tensor in loaded.items():
            assert torch.equal(self.site.engine.weights[name], tensor)


@pytest.fixture(params=["stream", "shared"])
async def way(site, request):
    way = Way(site, request.param)
    yield way
    way.client.close()


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr("ibtree.wire.messages.SENT_BYTES", 50)
    monkeypatch.setattr("server_ext.weights.shared_folder.CHUNK_BYTES", 50)


async def test_whole_versions_and_deltas_of_many_chunks(way, site, small_chunks):
    base = version_of(site.weights.folder, 3)
    outcome = await way.push(base)
    assert (outcome.version, outcome.state, outcome.digest) == (3, "serving", base.manifest.digest)
    assert outcome.pause_s > 0
    site.weights.check(3)
    version = delta_of(site.weights.folder, base, 4)
    await way.push(version)
    site.weights.check(4, version)
    served = await site.client.get_weights()
    assert [(stored.version, stored.base_version) for stored in served.kept] == [(3, None), (4, 3)]
    again = await way.push(version)
    assert (again.version, again.pause_s) == (4, 0.0)
    assert site.engine.updates == [3, 4]
    assert not list((site.weights.folder / "shared").iterdir())


async def test_refusals(way, site):
    base = version_of(site.weights.folder, 3)
    await way.push(base)
    older = version_of(site.weights.folder, 2)
    await way.refused(older, REFUSED, "not newer")
    other = version_of(site.weights.folder, 3, versions.tensors(9))
    await way.refused(other, REFUSED, "not newer")
    version = version_of(site.weights.folder, 4)
    version.manifest = version.but(model_id="x" * 64)
    await way.refused(version, REFUSED, "model_id")
    delta = delta_of(site.weights.folder, base, 5)
    delta.manifest = delta.but(base_version=1)
    await way.refused(delta, REFUSED, "holds version 3")


@pytest.mark.parametrize("kind", ["whole", "delta"])
async def test_200_bit_flips_and_truncations(way, site, kind):
    """Whatever arrives instead of the announced bytes, the old version serves on. Of a compressed
    frame a few bits mean nothing: then it is the announced version to the bit that serves."""
    rng, harmless = random.Random(0), 0
    served = version_of(site.weights.folder, 3)
    await way.push(served)
    for attempt in range(200):
        number = served.manifest.version + 1
        if kind == "delta":
            good = delta_of(site.weights.folder, served, number)
        else:
            good = version_of(site.weights.folder, number)
        data_at, _ = read_header(good.path)
        data = bytearray(good.path.read_bytes())
        if attempt % 2:
            data[rng.randrange(data_at, len(data))] ^= 1 << rng.randrange(8)
        else:
            size = len(data)
            del data[rng.randrange(size) :]
            if attempt % 4:  # and filled up to the announced size
                data += rng.randbytes(size - len(data))
        good.path.write_bytes(data)
        try:
            await way.refused(good, INVALID, "weights|chunk")
        except pytest.fail.Exception:
            harmless, served = harmless + 1, good
        site.weights.check(served.manifest.version, served)
    assert harmless <= (20 if kind == "delta" else 0)
    last = version_of(site.weights.folder, served.manifest.version + 1)
    await way.push(last)
    site.weights.check(last.manifest.version, last)


async def test_a_file_that_ends_early_or_goes_on(way, site):
    version = version_of(site.weights.folder, 4)
    data = version.path.read_bytes()
    for content in (b"", data[:-1], data + b"\0"):
        version.path.write_bytes(content)
        await way.refused(version, INVALID, "chunk")
    version.path.write_bytes(data)
    await way.push(version)
    site.weights.check(4)


# ---- the stream


@pytest.fixture
def large(monkeypatch) -> None:
    """Tensors of some megabytes, in chunks of 64 KiB."""
    monkeypatch.setitem(versions.SHAPES, "model.a", (300_000, 3))
    monkeypatch.setattr("ibtree.wire.messages.SENT_BYTES", 65536)


async def test_a_broken_stream_goes_on_where_it_stopped(large, tmp_path, monkeypatch):
    starts, receive = [], Inbox.receive

    async def noted(self, manifest, source):
        return await receive(self, manifest, lambda start: (starts.append(start), source(start))[1])

    monkeypatch.setattr(Inbox, "receive", noted)
    async with Site(tmp_path) as site, Proxy(site.target, [1_500_000, 900_000]) as proxy:
        version = version_of(tmp_path, 4)
        size = version.manifest.file_bytes
        with Client(proxy.target, timeout_s=20) as client:
            push = partial(client.push_weights, version.manifest, version.path, timeout_s=20)
            outcome = await asyncio.to_thread(push)
        assert outcome.state == "serving"
        site.weights.check(4)
        assert proxy.broken == 2 and len(starts) == 3
        assert starts[0] == 0 < starts[1] < starts[2]
        assert all(start % 65536 == 0 for start in starts)
        assert proxy.sent < 1.5 * size


async def test_another_version_does_not_go_on_with_what_is_there(large, tmp_path):
    async with Site(tmp_path) as site, Proxy(site.target, [1_500_000]) as proxy:
        first, second = version_of(tmp_path, 4), version_of(tmp_path, 5)
        with Client(proxy.target, timeout_s=20) as client:
            exchange = Exchange(first.manifest, first.path, "")

            def one_try() -> None:
                call = calls.push_weights(exchange.requests())
                push = call.method.on(client._channel.stream_stream)
                for message in push(call.request, timeout=20):
                    exchange.answered(call.decode(message))

            with pytest.raises(grpc.RpcError):
                await asyncio.to_thread(one_try)
            exchange.close()
        await until(lambda: site.updater.state == "rejected")
        await site.client.push_weights(second.manifest, second.path)
        site.weights.check(5)


async def test_a_push_that_gets_nowhere_is_given_up(large, tmp_path):
    async with Site(tmp_path) as site, Proxy(site.target, [20_000] * 50) as proxy:
        version = version_of(tmp_path, 4)
        with Client(proxy.target, timeout_s=20) as client:
            push = partial(client.push_weights, version.manifest, version.path, timeout_s=60)
            with pytest.raises(RpcFailed) as caught:
                await asyncio.to_thread(push)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert proxy.broken < 40
        site.weights.check(0)


async def test_an_asynchronous_push_that_is_cancelled(large, tmp_path):
    async with Site(tmp_path) as site:
        version = version_of(tmp_path, 4)
        site.engine.half_way.clear()
        push = asyncio.create_task(site.client.push_weights(version.manifest, version.path))
        await until(lambda: site.engine.updating)
        push.cancel()
        with pytest.raises(asyncio.CancelledError):
            await push
        site.engine.half_way.set()
        await until(lambda: site.updater.state == "serving")  # it was all there: it goes its way
        site.weights.check(4)


# ---- the shared folder


@pytest.fixture
def outside(site) -> Version:
    """A version that lies beside the shared folder."""
    version = version_of(site.weights.folder, 4)
    shared = site.weights.folder / "shared"
    (shared / "in").mkdir()
    (shared / "link").symlink_to(version.path)
    (shared / "up").symlink_to(site.weights.folder)
    (shared / "in" / "link").symlink_to(version.path)
    os.mkfifo(shared / "pipe")
    return version


PATHS = [
    "/",
    ".",
    "..",
    "",
    "in",
    "nothing",
    "in/nothing",
    "link",
    "in/link",
    "pipe",
    "\0",
    "in/..",
]


@pytest.mark.parametrize(
    "path",
    [
        *PATHS,
        "../push-4.safetensors",
        "up/push-4.safetensors",
        "in/../../push-4.safetensors",
        "absolute",
        "link/x",
    ],
)
async def test_nothing_but_files_below_the_folder_is_read(site, outside, path):
    path = str(outside.path) if path == "absolute" else path
    push = site.client.push_weights(outside.manifest, Path("/nothing"), shared_path=path or "./")
    with pytest.raises(RpcFailed, match="shared_path") as caught:
        await push
    assert caught.value.code is INVALID
    site.weights.check(0)
    inside = site.weights.folder / "shared" / "in" / "v.safetensors"
    inside.write_bytes(outside.path.read_bytes())
    await site.client.push_weights(
        outside.manifest, Path("/nothing"), shared_path="in/v.safetensors"
    )
    site.weights.check(4)


async def test_without_a_shared_folder_the_bytes_are_asked_for(tmp_path):
    async with Site(tmp_path) as site:
        version = version_of(tmp_path, 4)
        with pytest.raises(RpcFailed, match="--shared-dir") as caught:
            await site.client.push_weights(version.manifest, version.path, shared_path="x")
        assert caught.value.code is REFUSED
        await site.client.push_weights(version.manifest, version.path)
        site.weights.check(4)


async def test_a_file_that_changes_after_the_push_changes_nothing(site):
    """The server has a copy of its own."""
    path = site.weights.folder / "shared" / "v.safetensors"
    version = version_of(site.weights.folder, 4)
    path.write_bytes(version.path.read_bytes())
    await site.client.push_weights(version.manifest, path, shared_path="v.safetensors")
    save_file(versions.tensors(9), path)
    path.unlink()
    await site.weights.restart()
    site.weights.check(4)
