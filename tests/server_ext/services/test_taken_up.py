"""A SampleTree whose stream breaks is taken up again by its call's id, for a minute."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from ibtree import AsyncClient, Client, Tree
from ibtree.client import RpcFailed
from ibtree.client.sampling import Sampling
from ibtree.messages import Expansion
from ibtree.tree import StopCause
from ibtree.wire import calls, parts
from ibtree.wire.calls import CANCEL_TREE, SAMPLE_TREE
from ibtree.wire.messages import event_from_proto
from ibtree.wire.v1 import sampling_pb2
from server_ext.errors import EngineError
from server_ext.trees import growths
from tests.server_ext.fakes import until
from tests.server_ext.proxy import Proxy
from tests.server_ext.site import DEFAULTS, Site, prompt


@pytest.fixture
async def site(tmp_path):
    async with Site(tmp_path, max_calls=2) as site:
        yield site


class Attempt:
    """One stream of a call, on a connection of its own."""

    def __init__(self, site: Site, call_id: str, received: int = 0, **options) -> None:
        self.channel = grpc.aio.insecure_channel(
            site.target, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        request = calls.sample_tree(prompt(**options), False, False, call_id).request
        request.received_expansions = received
        self.stream = SAMPLE_TREE.on(self.channel.unary_stream)(request, timeout=20)
        self.reading = asyncio.ensure_future(self.events())

    async def events(self):
        return [event_from_proto(message) async for message in self.stream]

    async def breaks(self) -> None:
        """Its connection is gone."""
        await self.channel.close(None)
        await asyncio.wait({self.reading})


def stop_at(site: Site, number: int) -> None:
    """The rollout of this number hangs, and those after it, until `go_on` is set."""
    written = site.engine.write

    def write(ids, n):
        if n == number - 1:
            site.engine.go_on.clear()
        return written(ids, n)

    site.engine.write = write


async def test_it_goes_on_where_it_was(site):
    stop_at(site, 4)
    first = Attempt(site, "c", id="mine")
    await until(lambda: any(rid.endswith("/4") for rid in site.engine.running))
    await first.breaks()
    await asyncio.sleep(0.05)
    assert site.engine.running, "the rollout goes on"
    second = Attempt(site, "c", 3, id="mine")
    site.engine.go_on.set()
    *expansions, tree = await second.reading
    assert [e.trajectories for e in expansions] == [4, 5, 6]
    assert tree.trajectories == len(site.engine.requests) == DEFAULTS.trajectories
    assert tree.stop_cause is StopCause.COMPLETE
    await second.channel.close()


async def test_a_stream_that_nobody_noticed_to_be_broken_ends(site):
    stop_at(site, 2)
    first = Attempt(site, "c")
    await until(lambda: site.engine.running)
    second = Attempt(site, "c")
    await asyncio.wait({first.reading}, timeout=5)
    error = first.reading.exception()
    assert error.code() is grpc.StatusCode.ABORTED and "took the tree up" in error.details()
    site.engine.go_on.set()
    assert len(await second.reading) == DEFAULTS.trajectories + 1
    assert len(site.engine.requests) == DEFAULTS.trajectories
    for attempt in (first, second):
        await attempt.channel.close()


async def test_a_tree_whose_last_message_got_lost_is_told_again(site):
    first = Attempt(site, "c", id="mine")
    told = await first.reading
    again = Attempt(site, "c", DEFAULTS.trajectories, id="mine")
    assert await again.reading == told[-1:]
    assert len(site.engine.requests) == DEFAULTS.trajectories
    assert site.sampling.interactive == 0
    for attempt in (first, again):
        await attempt.channel.close()


async def test_nobody_comes_in_time(site, monkeypatch):
    monkeypatch.setattr(growths, "_KEPT_S", 0.2)
    site.engine.go_on.clear()
    first = Attempt(site, "c")
    await until(lambda: site.engine.running)
    await first.breaks()
    await asyncio.sleep(0.1)
    assert site.engine.running
    await until(lambda: not site.engine.running)
    await until(lambda: not site.forest.calls.growing)
    assert not site.sampling._growths._all and not site.sampling._growths._by_id
    site.engine.go_on.set()
    await site.still_serves()


async def test_another_call_with_the_same_id_is_refused(site):
    site.engine.go_on.clear()
    first = Attempt(site, "c", id="mine")
    await until(lambda: site.engine.running)
    other = Attempt(site, "c", id="another")
    with pytest.raises(grpc.aio.AioRpcError, match="call_id 'c'") as caught:
        await other.reading
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    site.engine.go_on.set()
    assert len(await first.reading) == DEFAULTS.trajectories + 1
    for attempt in (first, other):
        await attempt.channel.close()


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (sampling_pb2.SampleTreeRequest(call_id="x" * 257), "call_id"),
        (sampling_pb2.SampleTreeRequest(received_expansions=-1), "received_expansions"),
    ],
)
async def test_bad_fields(site, request_, field):
    request_.prompt.text, request_.prompt.answer = "What?", "1"
    with pytest.raises(grpc.aio.AioRpcError, match=field) as caught:
        await site.raw_sampling.SampleTree(request_).read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    cancel = CANCEL_TREE.on(site.channel.unary_unary)
    with pytest.raises(grpc.aio.AioRpcError, match="call_id"):
        await cancel(sampling_pb2.CancelTreeRequest())
    await cancel(sampling_pb2.CancelTreeRequest(call_id="nobody's"))


async def test_what_failed_is_grown_anew(site):
    site.engine.go_on.clear()
    first = Attempt(site, "c")
    await until(lambda: site.engine.running)
    await first.breaks()
    generate, site.engine.generate = site.engine.generate, None  # the next rollout fails
    written = site.engine.write
    site.engine.write = lambda ids, number: 1 / 0
    site.engine.go_on.set()
    await until(lambda: not site.sampling._growths._all)
    site.engine.generate, site.engine.write = generate, written
    second = Attempt(site, "c")
    assert len(await second.reading) == DEFAULTS.trajectories + 1
    await second.channel.close()


async def test_what_waits_is_bounded(site, monkeypatch):
    """Answers of calls that ended well are kept for a minute, but not without end."""
    monkeypatch.setattr(growths, "_MOST_KEPT_BYTES", 20_000)
    for _ in range(20):
        await site.client.sample_tree(prompt())
    kept = site.sampling._growths
    await until(lambda: all(growth.state is growths.State.DETACHED for growth in kept._all))
    assert 0 < len(kept._all) == len(kept._by_id) == len(kept._kept) < 20
    assert 0 < kept._kept_bytes == sum(growth.kept_bytes for growth in kept._all) <= 20_000
    await site.sampling.stop()
    assert not (kept._all or kept._by_id or kept._kept or kept._kept_bytes or kept.growing)


async def test_the_end_of_the_server_ends_them(site):
    site.engine.go_on.clear()
    first = Attempt(site, "c")
    await until(lambda: site.engine.running)
    await first.breaks()
    await site.sampling.stop()
    assert not site.engine.running and not site.forest.calls.growing


# ---- by our clients


@pytest.mark.parametrize("tree_only", [True, False])
async def test_our_clients_take_it_up(site, tree_only):
    """The connection breaks several times while the tree grows; it is grown once."""
    stop_at(site, 3)
    async with Proxy(site.target, []) as proxy:

        async def breaks() -> None:
            for _ in range(3):
                await until(lambda: site.engine.running)
                await asyncio.sleep(0.1)
                proxy.break_all()
            site.engine.go_on.set()

        breaking = asyncio.create_task(breaks())

        def sampled() -> list:
            with Client(proxy.target) as client:
                return list(client._sampled(prompt(id="mine"), False, tree_only, 20.0))

        *expansions, tree = await asyncio.to_thread(sampled)
        await breaking
    told = [e.trajectories for e in expansions if isinstance(e, Expansion)]
    assert told == ([] if tree_only else [*range(1, DEFAULTS.trajectories + 1)])
    assert isinstance(tree, Tree) and tree.trajectories == DEFAULTS.trajectories
    assert len(site.engine.requests) == DEFAULTS.trajectories


async def test_the_asyncio_client_takes_it_up(site):
    stop_at(site, 3)
    async with Proxy(site.target, []) as proxy:
        site.client._channel = grpc.aio.insecure_channel(proxy.target)
        growing = asyncio.create_task(site.client.sample_tree(prompt(), timeout_s=20.0))
        await until(lambda: any(rid.endswith("/3") for rid in site.engine.running))
        proxy.break_all()
        await asyncio.sleep(0.1)
        site.engine.go_on.set()
        assert (await growing).trajectories == DEFAULTS.trajectories
    assert len(site.engine.requests) == DEFAULTS.trajectories


async def test_a_client_that_gives_up_ends_its_tree(site):
    """Not after a minute, in which nobody would come."""
    site.engine.go_on.clear()
    growing = asyncio.create_task(site.client.sample_tree(prompt()))
    await until(lambda: site.engine.running)
    growing.cancel()
    await asyncio.wait({growing})
    assert not site.engine.running and site.sampling.interactive == 0
    with pytest.raises(RpcFailed, match="DEADLINE_EXCEEDED"):
        await site.client.sample_tree(prompt(), timeout_s=0.2)
    await until(lambda: not site.engine.running and not site.sampling.interactive)

    def leave() -> None:
        with Client(site.target) as client:
            events = client._sampled(prompt(rounds=9), False, False, 20.0)
            next(events)
            events.close()

    site.engine.go_on.set()
    stop_at(site, 3)
    await asyncio.to_thread(leave)
    assert not site.engine.running and site.sampling.interactive == 0


async def test_a_client_that_is_closed_first_leaves_quietly(site, caplog):
    """Its stream is closed later, when the interpreter gets to it."""
    stop_at(site, 3)
    client = AsyncClient(site.target)
    events = client.sample_events(prompt())
    await anext(events)
    await client.close()
    await events.aclose()

    def blocking() -> None:
        with Client(site.target) as client:
            events = client.sample_events(prompt())
            next(events)
        events.close()

    site.engine.go_on.set()
    await asyncio.to_thread(blocking)
    assert "an error occurred" not in caplog.text
    site.engine.go_on.set()


async def test_an_engine_that_fails_again_and_again_is_not_asked_for_ever(site):
    """What the server itself calls UNAVAILABLE would cost a tree each time."""

    def fail(ids, number):
        raise EngineError("lost")

    site.engine.write = fail
    with pytest.raises(RpcFailed, match="lost"):
        await site.client.sample_tree(prompt(init_rollouts=1, rounds=1), timeout_s=60.0)
    assert len(site.engine.requests) == 5


async def test_a_large_tree_comes_in_parts(site, monkeypatch):
    """Of at most 4 MiB: the default of every gRPC client."""
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    whole = await site.client.sample_tree(prompt(id="mine"))
    messages = []
    call = site.raw_sampling.SampleTree(
        calls.sample_tree(prompt(id="mine"), False, True).request, timeout=20
    )
    async for message in call:
        assert message.ByteSize() < 120
        messages.append(message)
    assert len(messages) > 5
    tree = parts.joined([message.tree_part for message in messages])
    assert (tree.parents, tree.steps, tree.ends) == (whole.parents, whole.steps, whole.ends)


async def test_a_damaged_tree_is_the_servers_fault(site, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    event = Sampling.event
    monkeypatch.setattr(
        Sampling, "event", lambda self, m: event(self, m) if len(self._parts) < 2 else None
    )
    with pytest.raises(RpcFailed, match="INTERNAL: the server's answer is wrong: tree"):
        await site.client.sample_tree(prompt())
