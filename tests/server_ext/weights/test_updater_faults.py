"""Updates that fail half-way, callers that leave, and kills at each transition."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

import pytest

from ibtree.errors import FieldError
from server_ext.errors import DrainTimeout, EngineError, MixedWeightsError, RestartNeededError
from server_ext.weights.host_copy import HostCopy
from server_ext.weights.store import Serving
from server_ext.weights.updater import WeightState
from tests.server_ext.fakes import until
from tests.server_ext.versions import Served, moved, tensors, version_of
from tests.server_ext.weights.test_updater import LIFE, watched


@pytest.fixture
async def at_3(served) -> Served:
    await served.push(3)
    return served


def pushing(served: Served, number: int, size: int = 100) -> asyncio.Task:
    version = version_of(served.folder, number)
    return asyncio.create_task(served.updater.push(version.manifest, version.source(size)))


@pytest.mark.parametrize("start", [0, 3])
async def test_an_update_that_fails_half_way_puts_the_old_version_back(served, start):
    if start:
        await served.push(start)
    served.engine.faults.append(EngineError("half-way"))
    with pytest.raises(EngineError, match="half-way"):
        await served.push(4)
    served.check(start)
    assert served.updater.state is WeightState.REJECTED
    await served.restart()
    served.check(start)
    await served.push(4)
    served.check(4)


async def test_what_a_rejected_version_left_in_the_host_copy_is_no_base(at_3, monkeypatch):
    """It could not be kept, and the served one not be read again: the next version shares tensors
    with it, which the engine does not have."""

    def unreadable(*_: object, **__: object) -> None:
        raise OSError("unreadable")

    fourth = tensors(4)
    with monkeypatch.context() as patched:
        patched.setattr(at_3.store, "keep", unreadable)
        patched.setattr(HostCopy, "load", unreadable)
        with pytest.raises(OSError, match="unreadable"):
            await at_3.push(4, fourth)
    at_3.check(3)
    fifth = moved(fourth, 5, "model.c")
    await at_3.push(5, fifth)
    at_3.check(5, fifth)


async def test_a_refused_file_does_not_stay(at_3):
    before, version = at_3.files(), version_of(at_3.folder, 4)
    damaged = bytearray(version.path.read_bytes())
    damaged[-1] ^= 1
    version.path.write_bytes(damaged)
    with pytest.raises(FieldError, match="wrong digest"):
        await at_3.updater.push(version.manifest, version.source())
    assert at_3.files() == before


async def test_failing_again_sets_broken_and_a_restart_heals(at_3):
    at_3.engine.faults.extend([EngineError("half-way"), RuntimeError("again")])
    with pytest.raises(MixedWeightsError):
        await at_3.push(4)
    assert at_3.updater.broken.is_set()
    assert at_3.updater.state is WeightState.REJECTED
    await at_3.restart()
    at_3.check(3)


async def test_an_engine_that_does_not_answer_ends_the_process(at_3, monkeypatch):
    monkeypatch.setattr("server_ext.engine.switch._ANSWER_S", 0.05)
    at_3.engine.half_way.clear()
    with pytest.raises(RestartNeededError, match="did not take weights within"):
        await at_3.push(4)
    assert at_3.updater.broken.is_set()
    assert at_3.updater.state is WeightState.REJECTED
    await at_3.restart()
    at_3.check(3)


async def test_a_drain_timeout_keeps_the_old_version(at_3):
    at_3.engine.switch.drain_timeout_s = 0.02
    async with at_3.engine.switch.gate.rollout():
        with pytest.raises(DrainTimeout):
            await at_3.push(4)
        at_3.check(3)
        assert at_3.engine.updates == [3]
        assert at_3.updater.state is WeightState.REJECTED
    await at_3.push(4)
    at_3.check(4)


async def test_a_caller_cancelled_while_sending_changes_nothing(at_3):
    version, sent = version_of(at_3.folder, 4), asyncio.Event()

    async def stuck(start: int):
        async for chunk in version.source()(start):
            yield chunk
        sent.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(at_3.updater.push(version.manifest, stuck))
    await until(sent.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert at_3.updater.state is WeightState.REJECTED
    at_3.check(3)
    await at_3.push(5)
    at_3.check(5)


@pytest.mark.parametrize("call", ["verify", "keep"])
async def test_the_next_push_waits_for_the_threads_of_a_cancelled_one(at_3, call, monkeypatch):
    """They still read, or rename, the staged file that the next push is to become."""
    running, go_on = threading.Event(), threading.Event()
    owner, name = (at_3.updater._host, "receive") if call == "verify" else (at_3.store, "keep")
    work = getattr(owner, name)

    def slow(*args, **options):
        running.set()
        go_on.wait(10)
        return work(*args, **options)

    monkeypatch.setattr(owner, name, slow)
    task = pushing(at_3, 4)
    await until(running.is_set)
    task.cancel()
    await asyncio.sleep(0.02)
    monkeypatch.setattr(owner, name, work)
    states = watched(at_3)
    following = pushing(at_3, 5)
    await until(lambda: "received" in states)
    await asyncio.sleep(0.05)
    early = list(states)
    go_on.set()
    with suppress(asyncio.CancelledError):
        await task
    outcome = await asyncio.gather(following, return_exceptions=True)
    assert "verified" not in early, f"the next push went on while {call} of the last one ran"
    assert not isinstance(outcome[0], BaseException)
    at_3.check(5)


@pytest.mark.parametrize("cancels", [1, 2])
async def test_a_caller_cancelled_while_applying_leaves_a_whole_version(at_3, cancels):
    """However often it is cancelled; the next push waits for the end."""
    at_3.engine.half_way.clear()
    task = pushing(at_3, 4)
    await until(lambda: at_3.engine.updating)
    states = watched(at_3)
    following = pushing(at_3, 5)
    for _ in range(cancels):
        task.cancel()
        await asyncio.sleep(0.02)
    await until(lambda: "received" in states)
    early = list(states)
    at_3.engine.half_way.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    outcome = await asyncio.gather(following, return_exceptions=True)
    assert "verified" not in early, "the next push went on while the one before was being applied"
    assert not isinstance(outcome[0], BaseException)
    assert at_3.engine.updates == [3, 4, 5]
    assert states == ["announced", "received", "applied", "serving", *LIFE[2:]]
    at_3.check(5)


async def test_a_caller_cancelled_while_an_update_fails(at_3):
    at_3.engine.half_way.clear()
    at_3.engine.faults.append(EngineError("half-way"))
    task = pushing(at_3, 4)
    await until(lambda: at_3.engine.updating)
    task.cancel()
    await asyncio.sleep(0.01)
    at_3.engine.half_way.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: at_3.updater.state is WeightState.REJECTED)
    at_3.check(3)


@pytest.mark.parametrize("at", LIFE)
async def test_a_kill_at_each_transition_serves_the_old_or_the_new(at_3, at):
    """The process dies on entering a state; the next one reads what is on disk."""

    class Killed(BaseException):
        pass

    enter = at_3.updater._enter

    def die(state, manifest) -> None:
        if state == at:
            at_3.updater._enter = lambda *_: None
            raise Killed
        enter(state, manifest)

    at_3.updater._enter = die
    with pytest.raises(Killed):
        await at_3.push(4)
    await at_3.restart()
    at_3.check(4 if at == "serving" else 3)
    await at_3.push(4)
    at_3.check(4)


@pytest.mark.parametrize("call", ["keep", "serve"])
@pytest.mark.parametrize("start", [0, 3])
async def test_a_disk_that_fails_leaves_engine_and_updater_of_one_mind(served, call, start):
    """Rejected means that the old version still serves, in the engine too; or it stops."""
    if start:
        await served.push(start)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    setattr(served.store, call, full)
    with pytest.raises((OSError, MixedWeightsError)):
        await served.push(4)
    assert served.updater.state is WeightState.REJECTED
    if not served.updater.broken.is_set():
        served.check(start)
    await served.restart()
    served.check(start)


async def test_rejected_pushes_do_not_cost_a_later_lower_version(at_3):
    """5 and 6 are staged but not applied; the learner goes back to an older checkpoint."""
    for number in (5, 6):
        at_3.engine.faults.append(EngineError("half-way"))
        with pytest.raises(EngineError):
            await at_3.push(number)
    version = await at_3.push(4)
    at_3.check(4)
    await at_3.restart()
    at_3.check(4)
    assert at_3.store.serving() == Serving(4, version.manifest.digest)
