"""The real SglangEngine and its weight switch, under the real updater, over SGLang's own manager of
weight updates: whatever fails between its begin and its end, the old version serves, or the server
says that it has to be restarted.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from types import SimpleNamespace

import pytest
import torch

from ibtree.tree.options import SamplingOptions
from server_ext.engine import cpu, loading, switch
from server_ext.engine.switch import Switch, in_buckets
from server_ext.errors import EngineError, MixedWeightsError, RestartNeededError
from server_ext.weights.store import Serving
from tests.server_ext.engine.sglang_side import SglangServed
from tests.server_ext.fakes import FakeWeights, until
from tests.server_ext.versions import tensors, version_of

CALLS = ("begin_weight_update", "update_weights_from_tensor", "end_weight_update")


@pytest.fixture(scope="module", autouse=True)
def sglang_process():
    """What SGLang sets up in a scheduler's process: a group of ranks, plugins, its settings."""
    cpu.select()
    from sglang.srt.plugins.hook_registry import HookRegistry

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    loading.register()
    HookRegistry.apply_hooks()
    module = "sglang.srt.model_executor.model_runner_components.weight_updater"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(f"{module}.get_model", lambda: SimpleNamespace(weight_cache_mode="off"))
        # it is for the reading process alone, and this is the writing one, too
        patched.setattr(f"{module}.monkey_patch_torch_reductions", lambda: None)
        yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch) -> None:
    """Each tensor is a bucket of its own."""
    monkeypatch.setattr(switch, "_BUCKET_BYTES", 24)


@pytest.fixture
async def at_3(tmp_path) -> SglangServed:
    served = SglangServed(tmp_path)
    await served.push(3)
    served.check(3)
    return served


async def refused_then_taken(served: SglangServed, words: str, error=EngineError) -> None:
    """A push fails for this reason; the old version serves, in the engine too, and so does the next
    one when nothing is in its way."""
    with pytest.raises(error, match=words) as caught:
        await served.push(4)
    assert not isinstance(caught.value, RestartNeededError)
    served.check(3)
    assert served.updater.state == "rejected"
    assert served.store.serving() == served.updater.serving
    await served.push(5)
    served.check(5)


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("fault", [RuntimeError, KeyError, torch.OutOfMemoryError, AssertionError])
async def test_an_exception_in_the_models_loader_is_a_rejected_push(at_3, at, fault):
    at_3.model.faults.extend([*[None] * at, fault("no such parameter")])
    await refused_then_taken(at_3, f"{fault.__name__}.*no such parameter")


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", CALLS)
async def test_a_call_that_fails_on_its_way_is_a_rejected_push(at_3, method, when, at):
    """Before it reaches the scheduler, or when the scheduler has done it: then nobody here knows
    whether a session is open."""
    if at and method != "update_weights_from_tensor":
        pytest.skip("it is called once")

    def fail() -> None:
        raise ConnectionError("the message was lost")

    faults = at_3.manager.before if when == "before" else at_3.manager.after
    faults[method] = deque([*[None] * at, fail])
    if method == "begin_weight_update":  # tried again at once
        await at_3.push(4)
        at_3.check(4)
    else:
        await refused_then_taken(at_3, "the message was lost", ConnectionError)


@pytest.mark.parametrize("name", ["begin_weight_update", "end_weight_update"])
async def test_an_exception_in_sglangs_own_begin_or_end(at_3, monkeypatch, name):
    """Such as kernels' layouts that cannot be made anew."""
    updater = at_3.manager.scheduler.tp_worker.model_runner.weight_updater
    original, raised = getattr(type(updater), name), []

    def fails_once(self, **options):
        if not raised:
            raised.append(True)
            raise ValueError("cannot repack")
        return original(self, **options)

    monkeypatch.setattr(type(updater), name, fails_once)
    if name == "begin_weight_update":
        await at_3.push(4)
        at_3.check(4)
    else:
        await refused_then_taken(at_3, "ValueError: cannot repack")


async def test_a_session_that_something_else_left_open_is_ended(at_3):
    await at_3.manager.begin_weight_update(SimpleNamespace(selector="all"), None)
    await at_3.push(4)
    at_3.check(4)


async def test_a_source_that_fails_half_way_ends_the_session(at_3):
    """The tensors are read while they are loaded: from a disk that may fail."""
    engine = at_3.engine

    def read():
        yield "model.a", tensors(4)["model.a"]
        raise OSError("unreadable")

    async with engine.paused():
        with pytest.raises(OSError, match="unreadable"):
            await engine.load(read(), 4)
        assert not at_3.manager.open
        await engine.load(tensors(3).items(), 3)
    at_3.check(3)


async def test_weights_that_cannot_be_put_back_ask_for_a_restart(at_3):
    """The process ends, and the next one serves the newest version that served."""
    at_3.model.faults.extend([None, RuntimeError("first"), RuntimeError("sticky")])
    with pytest.raises(MixedWeightsError, match=r"could not be put back: .*sticky"):
        await at_3.push(4)
    assert at_3.updater.broken.is_set() and at_3.engine._switch.state == "broken"
    assert not at_3.manager.open
    with pytest.raises(RestartNeededError, match="restarted"):
        await at_3.push(5)
    await at_3.restart()
    at_3.check(3)


async def test_a_version_that_does_not_load_at_the_start_asks_for_a_restart(at_3):
    at_3._build()
    at_3.model.faults.append(RuntimeError("sticky"))
    with pytest.raises(MixedWeightsError) as caught:
        await at_3.updater.restore()
    assert "sticky" in str(caught.value.__cause__)
    await at_3.restart()
    at_3.check(3)


async def test_half_a_version_does_not_run(at_3):
    """Whoever forgets to put the old one back is told so, and rollouts wait."""
    at_3.model.faults.extend([None, RuntimeError("half")])
    with pytest.raises(MixedWeightsError):
        async with at_3.engine.paused():
            with pytest.raises(EngineError, match="half"):
                await at_3.engine.load(tensors(4).items(), 4)
    assert at_3.updater.broken.is_set()
    waiting = asyncio.create_task(at_3.engine.generate("t/1", [1], SamplingOptions(), 9))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    waiting.cancel()


@pytest.mark.parametrize("method", ["pause_generation", "continue_generation"])
async def test_a_pause_that_fails_changes_nothing_and_an_engine_that_does_not_go_on_is_broken(
    at_3, method
):
    def fail() -> None:
        raise ConnectionError("lost")

    pauses = method == "pause_generation"
    (at_3.manager.after if pauses else at_3.manager.before)[method] = deque([fail])
    with pytest.raises(ConnectionError if pauses else RestartNeededError, match="lost"):
        await at_3.push(4)
    if pauses:
        at_3.check(3)
        await at_3.push(5)
        at_3.check(5)
    else:
        assert at_3.updater.broken.is_set()


@pytest.mark.parametrize("method", CALLS)
async def test_an_engine_that_does_not_answer_asks_for_a_restart(at_3, monkeypatch, method):
    monkeypatch.setattr(switch, "_ANSWER_S", 0.05)

    async def hangs(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(at_3.manager, method, hangs)
    async with asyncio.timeout(5):
        with pytest.raises(RestartNeededError, match=r"did not .* within 0\.05 s"):
            await at_3.push(4)
    assert at_3.updater.broken.is_set()
    await at_3.restart()
    at_3.check(3)


async def test_no_call_brings_more_than_a_bucket(tmp_path, monkeypatch):
    served = SglangServed(tmp_path)
    await served.push(3)
    assert served.model.largest_load == 24
    assert served.manager.calls.count("update_weights_from_tensor") == 3
    monkeypatch.setattr(switch, "_BUCKET_BYTES", 44)
    await served.push(4)
    assert served.model.largest_load == 40
    assert served.manager.calls.count("update_weights_from_tensor") == 5
    served.check(4)


@pytest.mark.parametrize(
    ("sizes", "most", "expected"),
    [
        ([], 10, []),
        ([10], 10, [[10]]),
        ([11], 10, [[11]]),
        ([4, 4, 4], 10, [[4, 4], [4]]),
        ([4, 11, 4, 4], 10, [[4], [11], [4, 4]]),
        ([0, 0, 11], 10, [[0, 0], [11]]),
    ],
)
def test_buckets_are_split_by_size_and_never_within_a_tensor(sizes, most, expected):
    named = [(str(at), torch.zeros(size, dtype=torch.int8)) for at, size in enumerate(sizes)]
    made = [[tensor.nbytes for _, tensor in bucket] for bucket in in_buckets(named, most)]
    assert made == expected


def test_tensors_stay_on_the_host_until_the_loader_takes_its_part():
    """SGLang moves whole buckets to the GPU first; `meta` stands for one."""
    from sglang.srt.model_executor.model_runner_components import weight_updater

    tensor = torch.zeros(3)
    assert weight_updater._unwrap_tensor(tensor, 0, torch.device("meta")) is tensor


async def test_tensors_are_neither_read_nor_serialised_on_the_loop(at_3, monkeypatch):
    """Either takes as long as gigabytes do."""
    from sglang.srt.utils import MultiprocessingSerializer

    serialize, loops, threads = MultiprocessingSerializer.serialize, threading.get_ident(), set()

    def noted(*arguments):
        threads.add(threading.get_ident())
        return serialize(*arguments)

    def read():
        for pair in tensors(4).items():
            threads.add(threading.get_ident())
            yield pair

    monkeypatch.setattr(MultiprocessingSerializer, "serialize", noted)
    async with at_3.engine.paused():
        await at_3.engine.load(read(), 4)
    assert threads and loops not in threads


async def test_the_life_of_a_switch(monkeypatch):
    monkeypatch.setattr(switch, "_BUCKET_BYTES", 1000)
    seen: list[str] = []
    port = FakeWeights(seen.append)
    life = Switch(port, None)
    assert life.state == "running"
    async with life.paused():
        assert life.state == "held"
        port.half_way.clear()
        load = asyncio.create_task(life.load(tensors(1).items(), 1))
        await until(lambda: port.open)
        assert life.state == "loading"
        port.half_way.set()
        await load
        assert life.state == "on trial" and seen == ["1.1"]
        assert life.on_trial({"1.1"}) and not life.withdrew({"1.1"})
        await life.load(tensors(0).items(), 0)
        assert life.withdrew({"0", "1.1"}) and not life.withdrew({"0.2"})
    assert life.state == "running" and not life.on_trial({"0.2"})
    assert not life.withdrew({"0.2"})
    with pytest.raises(RuntimeError, match="is running: it cannot become loading"):
        await life.load([], 1)


async def test_what_serves_after_a_failure_is_what_a_restart_serves(at_3):
    at_3.model.faults.append(RuntimeError("no"))
    with pytest.raises(EngineError):
        await at_3.push(4)
    assert at_3.store.serving() == Serving(3, version_of(at_3.folder, 3).manifest.digest)
    await at_3.restart()
    at_3.check(3)
