"""Trees larger than a message: leased in parts, whatever breaks on the way."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from ibtree import Client
from ibtree.client import RpcFailed
from ibtree.tree import Finish, Step, Tree
from ibtree.wire.trees import tree_to_bytes
from ibtree.wire.v1 import queue_pb2
from server_ext.queue.journal import Journal
from server_ext.queue.schema import PART_BYTES
from server_ext.services.queue import QueueService
from tests.server_ext.site import Site

TOKENS = 1_000_000


@pytest.fixture(scope="module")
def large() -> bytes:
    """A tree of about 5 MiB on the wire."""
    tree = Tree(prompt=(1, 2), tree_id="run/large")
    for branch in range(4):
        ids = tuple((branch * 7 + n) % 250 for n in range(TOKENS // 4))
        step = Step(ids, tuple(-(n % 7) / 8 for n in range(len(ids))), (3,) * len(ids))
        tree.insert(0, [step], branch / 4, Finish.STOP)
    return tree_to_bytes(tree)


@pytest.fixture
async def site(tmp_path):
    async with Site(tmp_path) as site:
        yield site


def hold(site: Site, *trees: tuple[str, bytes]):
    """Brings trees to graded, in this order."""

    def store(journal: Journal) -> None:
        journal.submit([(id_, b"prompt of " + id_.encode()) for id_, _ in trees])
        journal.take(len(trees))
        for id_, data in trees:
            journal.store(id_, data)

    return site.journal(store)


def small(id_: str) -> tuple[str, bytes]:
    tree = Tree(prompt=(1,), tree_id=id_)
    tree.insert(0, [Step((1,), (-0.5,), (0,))], 1.0, Finish.STOP)
    return id_, tree_to_bytes(tree)


async def test_a_tree_larger_than_a_message_is_leased_between_others(site, large):
    assert len(large) > 5 * 1024**2
    await hold(site, small("run/a"), ("run/large", large), small("run/b"))
    leases = await site.client.lease_trees(5)
    assert [lease.tree.tree_id for lease in leases] == ["run/a", "run/large", "run/b"]
    assert [(lease.problem, lease.unread_bytes) for lease in leases] == [("", 0)] * 3
    assert tree_to_bytes(leases[1].tree) == large
    await site.client.nack_trees([leases[1].lease_id], "again")

    def blocking() -> bytes:
        with Client(site.target) as client:
            (lease,) = client.lease_trees(1)
            client.ack_trees([lease.lease_id])
            return tree_to_bytes(lease.tree)

    assert await asyncio.to_thread(blocking) == large


async def test_no_message_is_larger_than_4_mib(site, large):
    """By a client with gRPC's own limit, which ours raises."""
    await hold(site, ("run/large", large), *(small(f"run/{n}") for n in range(20)))
    async with grpc.aio.insecure_channel(site.target) as channel:
        stub = site.raw_queue.__class__(channel)
        response = await stub.LeaseTrees(queue_pb2.LeaseTreesRequest(max_trees=30))
        assert len(response.leases) == 21
        first = response.leases[0]
        assert not first.HasField("tree")
        assert (first.tree_id, first.tree_bytes) == ("run/large", len(large))
        call = stub.ReadTree(queue_pb2.ReadTreeRequest(lease_id=first.lease_id))
        parts = [part.data async for part in call]
    assert b"".join(parts) == large and max(map(len, parts)) <= PART_BYTES


async def test_a_stream_that_breaks_goes_on_where_it_stopped(tmp_path, large, monkeypatch):
    starts = []
    whole = QueueService.ReadTree

    async def breaking(self, request, context):
        starts.append(request.start)
        parts = 0
        async for part in whole(self, request, context):
            yield part
            parts += 1
            if parts == 3:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "a proxy went away")

    monkeypatch.setattr(QueueService, "ReadTree", breaking)
    async with Site(tmp_path) as site:
        await hold(site, ("run/large", large))
        (lease,) = await site.client.lease_trees(1)
    assert tree_to_bytes(lease.tree) == large
    assert starts == [n * PART_BYTES for n in range(0, len(large) // PART_BYTES + 1, 3)]


async def test_a_lease_that_runs_out_while_it_is_read_takes_no_other_down(site, large):
    await hold(site, ("run/large", large))
    with pytest.raises(RpcFailed, match="NOT_FOUND"):
        await site.client.lease_trees(1, lease_s=0.001)
    await hold(site, small("run/b"))
    leases = await site.client.lease_trees(2, lease_s=0.001)
    assert [lease.tree.tree_id for lease in leases] == ["run/b"]


async def test_bytes_that_are_no_tree_are_a_problem_of_the_lease(site):
    await hold(site, ("run/bad", b"\xff" * (4 * 1024**2)))
    (lease,) = await site.client.lease_trees(1)
    assert lease.problem and lease.tree.tree_id == "run/bad"


async def test_the_loop_turns_while_a_large_tree_is_read(site, large):
    await hold(site, ("run/large", large))
    response = await site.raw_queue.LeaseTrees(queue_pb2.LeaseTreesRequest(max_trees=1))
    (lease,) = response.leases
    longest, last = 0.0, time.perf_counter()
    async for _ in site.raw_queue.ReadTree(queue_pb2.ReadTreeRequest(lease_id=lease.lease_id)):
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    assert longest < 1.0
