"""An operator holds the queue, and lets it go."""

from __future__ import annotations

import asyncio
import json

import grpc
import pytest

from ibtree import Client
from ibtree.wire.v1 import queue_pb2
from tests.ibtree.cli.command import ibtpo
from tests.server_ext.fakes import until
from tests.server_ext.site import DEFAULTS, Site, prompt


@pytest.fixture
async def site(tmp_path):
    async with Site(tmp_path) as site:
        yield site


async def test_a_pause_lets_what_grows_go_on_and_begins_nothing(site):
    site.engine.go_on.clear()
    await site.client.submit_prompts([prompt("Q?", "a")])
    await until(lambda: site.engine.running)
    assert await site.client.pause_queue("new grader") == 1
    await site.client.submit_prompts([prompt("Q?", "b")])
    site.engine.go_on.set()
    (lease,) = await site.client.lease_trees(2, wait_s=10)
    assert lease.tree.tree_id == "a"
    await asyncio.sleep(0.1)
    stats = await site.client.queue_stats()
    assert (stats.queued, stats.growing, stats.holds) == (1, 0, ("operator: new grader",))
    # whoever waits for an answer is served
    tree = await site.client.sample_tree(prompt("Q?"), timeout_s=20)
    assert tree.trajectories == DEFAULTS.trajectories
    assert await site.client.resume_queue() == ()
    (lease,) = await site.client.lease_trees(2, wait_s=10)
    assert lease.tree.tree_id == "b"
    assert (await site.client.queue_stats()).holds == ()


async def test_a_drain_waits_for_what_grows(site):
    site.engine.go_on.clear()
    await site.client.submit_prompts([prompt("Q?", "a"), prompt("Q?", "b")])
    await until(lambda: len({rid.partition("/")[0] for rid in site.engine.running}) == 2)
    assert await site.client.drain_queue(wait_s=0.1) == 2
    drained = asyncio.create_task(site.client.drain_queue("update", wait_s=20))
    await asyncio.sleep(0.1)
    assert not drained.done()
    site.engine.go_on.set()
    assert await drained == 0
    stats = await site.client.queue_stats()
    assert (stats.graded, stats.holds) == (2, ("operator: update",))


async def test_who_else_holds_it_is_said(site):
    site.producer.taking.hold("grader", "away")
    await site.client.pause_queue()
    assert await site.client.resume_queue() == ("grader: away",)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [(("x" * 257, 0.0), "reason"), (("", -1.0), "wait_s"), (("", 601.0), "wait_s"),
     (("", float("nan")), "wait_s")],
)  # fmt: skip
async def test_bad_input_is_refused_and_holds_nothing(site, arguments, field):
    reason, wait_s = arguments
    request = queue_pb2.DrainQueueRequest(reason=reason, wait_s=wait_s)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await site.raw_queue.DrainQueue(request, timeout=20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith(f"{field}: ")
    assert (await site.client.queue_stats()).holds == ()


async def test_by_the_command_line(site):
    target = ["--server", site.target]
    code, out, _ = await ibtpo("queue", "pause", "--reason", "bell \x07", *target)
    assert code == 0 and "operator: bell \\x07" in out
    code, out, _ = await ibtpo("queue", "drain", "--wait-s=0.1", "--json", *target)
    assert code == 0 and json.loads(out)["holds"] == ["operator: drained"]
    code, out, _ = await ibtpo("queue", "resume", *target)
    assert code == 0 and "nothing" in out
    for words in (["status", "--reason=x"], ["pause", "--wait-s=1"], ["resume", "--wait-s=1"]):
        code, _, err = await ibtpo("queue", *words, *target)
        assert code == 1 and "allowed: ibtpo queue" in err


async def test_by_the_blocking_client(site):
    def calls() -> None:
        with Client(site.target, timeout_s=20) as client:
            assert client.pause_queue("x") == 0
            assert client.drain_queue("y", wait_s=1) == 0
            assert client.queue_stats().holds == ("operator: y",)
            assert client.resume_queue() == ()

    await asyncio.to_thread(calls)
