"""Pushes whose bytes are still coming: nobody waits for a sender, and each can be ended."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import replace
from functools import partial

import grpc
import pytest

from ibtree import Client
from ibtree.client import RpcFailed
from ibtree.wire.messages import push_first
from server_ext.errors import BrokenPushError, BusyError, PushEndedError
from tests.ibtree.cli.command import ibtpo
from tests.server_ext.fakes import until
from tests.server_ext.site import Site
from tests.server_ext.versions import Served, Version, delta_of, tensors, version_of


class Stalled:
    """A push that sends so many bytes and then nothing."""

    def __init__(self, served: Served, version: Version, sent: int = 0, **manifest: object) -> None:
        self.began, self.starts = asyncio.Event(), list[int]()
        self._version, self._sent = version, sent
        push = served.updater.push(version.but(**manifest), self._source)
        self.task = asyncio.create_task(push)

    async def _source(self, start: int):
        self.starts.append(start)
        if self._sent > start:
            yield self._version.path.read_bytes()[start : self._sent]
        self.began.set()
        await asyncio.Event().wait()

    async def ended(self, words: str, error: type[Exception] = PushEndedError) -> None:
        with pytest.raises(error, match=words):
            await asyncio.wait_for(self.task, 5)


@pytest.fixture
async def at_3(served) -> Served:
    await served.push(2)
    await served.push(3)
    return served


async def stalled(served: Served, number: int = 9, sent: int = 0, **manifest: object) -> Stalled:
    push = Stalled(served, version_of(served.folder, number), sent, **manifest)
    await push.began.wait()
    return push


def parts(served: Served) -> set[str]:
    return {name for name in served.files() if name.endswith(".part")} - {"spare.part"}


@pytest.mark.parametrize("sent", [0, 100])
async def test_a_rollback_does_not_wait_for_a_push_that_sends_nothing(at_3, sent):
    push = await stalled(at_3, sent=sent)
    begin = time.monotonic()
    outcome = await at_3.updater.rollback()
    assert time.monotonic() - begin < 1.0
    assert (outcome.version, outcome.restored_version) == (4, 2)
    await push.ended("version 9: a rollback ended this push")
    at_3.check(4, tensors(2))
    assert at_3.updater.state == "serving"
    await until(lambda: not parts(at_3))
    await at_3.push(9)
    at_3.check(9)


async def test_a_rollback_that_is_refused_ends_nothing(served):
    await served.push(3)
    push = await stalled(served)
    with pytest.raises(Exception, match="no version is kept"):
        await served.updater.rollback()
    assert not push.task.done()
    push.task.cancel()


async def test_a_newer_push_ends_an_older_one(at_3):
    push = await stalled(at_3, 4, 100)
    await at_3.push(5)
    await push.ended("version 4: a push of version 5 ended this push")
    at_3.check(5)
    assert at_3.updater.state == "serving"
    await until(lambda: not parts(at_3))


async def test_an_older_push_goes_past_a_newer_one_that_sends_nothing(at_3):
    """Or whoever announces a high version and sends nothing would keep everybody out."""
    push = await stalled(at_3, 9, 100)
    await at_3.push(4)
    at_3.check(4)
    assert not push.task.done() and parts(at_3)
    push.task.cancel()


async def test_whole_and_delta_come_beside_each_other(at_3):
    base = version_of(at_3.folder, 3)
    push = await stalled(at_3)
    version = delta_of(at_3.folder, base, 4)
    await at_3.updater.push(version.manifest, version.source(7))
    at_3.check(4, version)
    push.task.cancel()


async def test_a_newer_version_that_came_while_an_update_runs_follows_it(at_3):
    at_3.engine.half_way.clear()
    first, second = version_of(at_3.folder, 4), version_of(at_3.folder, 5)
    pushes = [asyncio.create_task(at_3.updater.push(first.manifest, first.source()))]
    await until(lambda: at_3.engine.updating)
    pushes.append(asyncio.create_task(at_3.updater.push(second.manifest, second.source())))
    await until(lambda: at_3.updater.state == "received")
    at_3.engine.half_way.set()
    assert [outcome.version for outcome in await asyncio.gather(*pushes)] == [4, 5]
    at_3.check(5)


async def test_a_delta_whose_base_is_on_its_way_is_judged_when_that_serves(at_3):
    base = version_of(at_3.folder, 4)
    at_3.engine.half_way.clear()
    pushes = [asyncio.create_task(at_3.updater.push(base.manifest, base.source()))]
    await until(lambda: at_3.engine.updating)
    version = delta_of(at_3.folder, base, 5)
    pushes.append(asyncio.create_task(at_3.updater.push(version.manifest, version.source())))
    await until(lambda: at_3.updater.state == "received")
    at_3.engine.half_way.set()
    await asyncio.gather(*pushes)
    at_3.check(5, version)


async def test_a_version_that_is_not_newer_any_more_when_its_turn_comes_is_refused(at_3):
    """A higher one is on its way into the engine while it comes: the check at the door is early."""
    at_3.engine.half_way.clear()
    fifth, fourth = version_of(at_3.folder, 5), version_of(at_3.folder, 4)
    first = asyncio.create_task(at_3.updater.push(fifth.manifest, fifth.source()))
    await until(lambda: at_3.engine.updating)
    late = asyncio.create_task(at_3.updater.push(fourth.manifest, fourth.source()))
    await until(lambda: at_3.updater.state == "received")
    at_3.engine.half_way.set()
    await first
    with pytest.raises(Exception, match="version: 4 is not newer than the served 5"):
        await late
    at_3.check(5)
    assert not parts(at_3)


# ---- a sender that sends nothing


@pytest.fixture
def impatient(tmp_path) -> Served:
    return Served(tmp_path, push_idle_timeout_s=0.1)


@pytest.mark.parametrize("sent", [0, 100])
async def test_a_push_that_sends_nothing_ends_by_itself_and_goes_on_later(impatient, sent):
    push = await stalled(impatient, 4, sent)
    await push.ended(f"nothing came of this push for 0.1 s after byte {sent}", BrokenPushError)
    assert impatient.updater.state == "rejected"
    again = await stalled(impatient, 4, sent)
    assert (push.starts, again.starts) == ([0], [sent])
    await again.ended("nothing came", BrokenPushError)
    await impatient.push(4)
    impatient.check(4)


async def test_a_slow_sender_is_waited_for(impatient):
    version = version_of(impatient.folder, 4)
    data = version.path.read_bytes()

    async def slow(start: int):
        for at in range(start, len(data), 64):
            await asyncio.sleep(0.02)
            yield data[at : at + 64]

    await impatient.updater.push(version.manifest, slow)
    impatient.check(4)


async def test_a_slow_disk_is_not_the_senders_fault(impatient, monkeypatch):
    from server_ext.weights import inbox

    append = inbox._append

    def slow(*arguments) -> int:
        time.sleep(0.3)
        return append(*arguments)

    monkeypatch.setattr(inbox, "_WRITE_BYTES", 200)
    monkeypatch.setattr(inbox, "_append", slow)
    await impatient.push(4)
    impatient.check(4)


async def test_nothing_that_a_slow_disk_may_hold_up_runs_on_the_loop(served, monkeypatch):
    from server_ext.weights import inbox

    loops, seen = threading.get_ident(), set()

    def noted(name, work, *arguments):
        assert threading.get_ident() != loops, name
        seen.add(name)
        return work(*arguments)

    for name in ("_append", "_made_room", "remove"):
        monkeypatch.setattr(inbox, name, partial(noted, name, getattr(inbox, name)))
    push = await stalled(served, 3, 100)
    await served.push(4)
    await push.ended("a push of version 4")
    assert seen == {"_append", "_made_room", "remove"}


async def test_manifests_are_not_hashed_on_the_loop(served, monkeypatch):
    """One may have tens of thousands of tensors."""
    from ibtree.weights import manifest

    loops, digest_of, threads = threading.get_ident(), manifest.digest_of, set()

    def noted(tensors):
        threads.add(threading.get_ident())
        return digest_of(tensors)

    monkeypatch.setattr(manifest, "digest_of", noted)
    version = version_of(served.folder, 4)
    await served.updater.push(version.but(), version.source())
    assert threads and loops not in threads


# ---- who takes over from whom


async def test_the_same_push_of_the_same_run_takes_over_from_its_dead_stream(served):
    version = version_of(served.folder, 4)
    push = await stalled(served, 4, 100, run_id="a")
    starts = []

    def source(start: int):
        starts.append(start)
        return version.source()(start)

    await served.updater.push(version.but(run_id="a"), source)
    assert starts == [100], "it goes on where the dead one stopped"
    await push.ended("another push of the same by its own run ended this push")
    served.check(4)


async def test_the_same_push_by_nobody_waits_for_the_stream_before_it(impatient):
    push = await stalled(impatient, 4, 100)
    await impatient.push(4)
    await push.ended("nothing came", BrokenPushError)
    impatient.check(4)


async def test_pushes_on_their_way_are_bounded(served):
    """Each takes the room of a whole version on the disk."""
    pushes = [await stalled(served, 9 - at) for at in range(4)]
    with pytest.raises(BusyError, match="pushes of versions 9, 8, 7, 6 are on their way"):
        await served.push(5)
    assert len(parts(served)) == 4
    assert served.updater.abort(9) == [9]
    await pushes[0].ended("an operator")
    await served.push(5)
    served.check(5)
    assert served.updater.abort() == [8, 7, 6]
    for push in pushes[1:]:
        await push.ended("an operator")
    assert not parts(served)


async def test_what_a_killed_server_left_is_removed(served):
    push = await stalled(served, 4, 100)
    assert parts(served)
    await served.restart()
    assert not parts(served)
    push.task.cancel()


# ---- over gRPC


async def test_a_peer_that_sends_a_manifest_and_then_nothing(tmp_path):
    """Rollbacks, pushes and the operator's abort go past it; it is told who ended it."""
    async with Site(tmp_path) as site:
        for number in (1, 2):
            version = version_of(tmp_path, number)
            await site.client.push_weights(version.manifest, version.path)

        async def silent(number: int):
            call = site.raw_weights.PushWeights(timeout=20)
            await call.write(push_first(version_of(tmp_path, number).manifest))
            assert (await call.read()).send_from == 0
            return call

        call = await silent(9)
        begin = time.monotonic()
        outcome = await site.client.rollback_weights()
        assert time.monotonic() - begin < 1.0 and outcome.version == 3
        assert await call.code() is grpc.StatusCode.ABORTED
        assert "a rollback ended this push" in await call.details()

        call = await silent(4)
        fifth = version_of(tmp_path, 5)
        await site.client.push_weights(fifth.manifest, fifth.path)
        assert await call.code() is grpc.StatusCode.ABORTED
        site.weights.check(5)

        call = await silent(9)
        code, out, err = await ibtpo("weights", "abort", f"--server={site.target}", "--json")
        assert (code, err, json.loads(out)) == (0, "", {"pushes_ended": 1, "versions": [9]})
        assert await call.code() is grpc.StatusCode.ABORTED
        assert "an operator ended this push" in await call.details()
        assert await site.client.abort_pushes() == []
        with Client(site.target) as client:
            assert await asyncio.to_thread(client.abort_pushes, 9) == []
        site.weights.check(5)


async def test_peers_that_stall_before_and_after_the_manifest_are_ended(tmp_path):
    async with Site(tmp_path, push_idle_timeout_s=0.2) as site:
        for first in (None, push_first(version_of(tmp_path, 9).manifest)):
            call = site.raw_weights.PushWeights(timeout=60)
            if first:
                await call.write(first)
                assert (await call.read()).send_from == 0  # its status follows what is read
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
            assert "0.2 s" in await call.details()


# ---- one run at a time


async def test_another_runs_push_is_refused_by_name(served):
    async def push(number: int, **manifest: object) -> None:
        version = version_of(served.folder, number)
        await served.updater.push(version.but(**manifest), version.source())

    await push(1, run_id="first")
    await push(2, run_id="first")
    words = "run first published version 2, which is served, .* this is run second"
    with pytest.raises(Exception, match=words) as caught:
        await push(3, run_id="second")
    assert "--take-over" in str(caught.value)
    served.check(2)
    await served.restart()
    with pytest.raises(Exception, match=words):
        await push(3, run_id="second")
    await push(3, run_id="second", take_over=True)
    await push(4, run_id="second")
    with pytest.raises(Exception, match="run second published version 4"):
        await push(5, run_id="first")
    await push(5)  # by hand
    await push(6, run_id="first")
    served.check(6)
    assert [kept.run_id for kept in served.updater.retained] == ["", "first"]


@pytest.mark.parametrize("run_id", ["x" * 201, "a\nb", "\x1b[2J"])
async def test_a_run_that_cannot_be_named_is_refused(served, run_id):
    version = version_of(served.folder, 1)
    with pytest.raises(Exception, match=r"manifest\.run_id: .* printable"):
        await served.updater.push(version.but(run_id=run_id), version.source())
    served.check(0)


async def test_the_status_names_the_run(tmp_path):
    async with Site(tmp_path) as site:
        version = version_of(tmp_path, 1)
        manifest = replace(version.manifest, run_id="run-a")
        await site.client.push_weights(manifest, version.path)
        assert (await site.client.get_weights()).kept[-1].run_id == "run-a"
        assert "by run run-a" in (await ibtpo("weights", f"--server={site.target}")).out
        with pytest.raises(RpcFailed, match="run run-a published version 1") as caught:
            other = version_of(tmp_path, 2)
            await site.client.push_weights(other.but(run_id="run-b"), other.path)
        assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
