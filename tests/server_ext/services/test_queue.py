"""The queue through gRPC: submit, lease, ack, nack, waiting; and weights beside it."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from ibtree import Client
from ibtree.client import RpcFailed
from ibtree.messages import QueueStats
from server_ext.errors import GrowthError
from server_ext.queue.journal import Journal
from tests.server_ext.fakes import until
from tests.server_ext.site import Site, prompt
from tests.server_ext.versions import MODEL_ID, version_of


@pytest.fixture
async def site(tmp_path):
    async with Site(tmp_path) as site:
        yield site


def prompts(*ids: str):
    return [prompt(f"Question {i}?", i) for i in ids]


async def leased(site: Site, count: int, **more):
    """Exactly `count` leases, as soon as they are there."""
    leases = []
    while len(leases) < count:
        leases += await site.client.lease_trees(count - len(leases), wait_s=10, **more)
    return leases


async def test_submit_lease_ack(site):
    assert await site.client.submit_prompts(prompts("a", "b", "c")) == (3, 0)
    leases = await leased(site, 3)
    assert {lease.tree.tree_id for lease in leases} == {"a", "b", "c"}
    for lease in leases:
        lease.tree.validate()
        assert lease.returns == 0
        assert lease.tree.prompt == site.tokenizer.encode(f"Question {lease.tree.tree_id}?")
    await site.client.extend_lease([lease.lease_id for lease in leases], lease_s=100)
    await site.client.ack_trees([leases[0].lease_id])
    await site.client.ack_trees([leases[0].lease_id])
    await site.client.nack_trees([leases[1].lease_id], "no")
    assert await site.client.queue_stats() == QueueStats(graded=1, leased=1, acked=1)
    (again,) = await leased(site, 1)
    assert (again.returns, again.tree.tree_id) == (1, leases[1].tree.tree_id)


async def test_the_same_by_the_synchronous_client(site):
    def calls() -> QueueStats:
        with Client(site.target, timeout_s=20) as client:
            assert client.submit_prompts(prompts("a")) == (1, 0)
            (lease,) = client.lease_trees(1, wait_s=10, lease_s=50)
            client.extend_lease([lease.lease_id])
            client.nack_trees([lease.lease_id])
            (lease,) = client.lease_trees(1)
            client.ack_trees([lease.lease_id])
            assert client.get_weights().model_id == MODEL_ID
            return client.queue_stats()

    assert await asyncio.to_thread(calls) == QueueStats(acked=1)


async def test_submitting_again_is_a_no_op(site):
    site.engine.go_on.clear()
    assert await site.client.submit_prompts(prompts("a", "b")) == (2, 0)
    assert await site.client.submit_prompts(prompts("a", "b", "c")) == (1, 2)
    site.engine.go_on.set()
    leases = await leased(site, 3)
    await site.client.ack_trees([lease.lease_id for lease in leases])
    assert await site.client.submit_prompts(prompts("a", "b")) == (0, 2)
    assert await site.client.lease_trees(3, wait_s=0.1) == []


async def test_another_prompt_with_a_known_id_is_a_conflict_and_queues_nothing(site):
    await site.client.submit_prompts(prompts("a"))
    for other in (
        prompt("Another question?", "a"),
        prompt("Question a?", "a", beta=4.0),
    ):
        with pytest.raises(RpcFailed, match="'a' is known with other content") as caught:
            await site.client.submit_prompts([*prompts("b"), other])
        assert caught.value.code is grpc.StatusCode.ALREADY_EXISTS
    assert await site.client.submit_prompts(prompts("b")) == (1, 0)


@pytest.fixture
def told(site):
    """Callers that wait look again only when they are told to."""
    graded = site.producer.graded
    site.producer.graded = lambda _: graded(30.0)


@pytest.mark.usefixtures("told")
async def test_waiting_returns_as_soon_as_a_tree_is_graded(site):
    site.engine.go_on.clear()
    await site.client.submit_prompts(prompts("a"))
    waiting = asyncio.create_task(site.client.lease_trees(4, wait_s=60))
    await until(lambda: site.engine.running)
    assert await site.client.lease_trees(4) == []  # without waiting
    assert not waiting.done()
    began = time.monotonic()
    site.engine.go_on.set()
    assert [lease.tree.tree_id for lease in await waiting] == ["a"]
    assert time.monotonic() - began < 5


@pytest.mark.usefixtures("told")
async def test_waiting_returns_as_soon_as_a_tree_is_given_back(site):
    await site.client.submit_prompts(prompts("a"))
    (lease,) = await leased(site, 1)
    waiting = asyncio.create_task(site.client.lease_trees(1, wait_s=60))
    await asyncio.sleep(0.05)
    began = time.monotonic()
    await site.client.nack_trees([lease.lease_id], "no")
    assert [lease.returns for lease in await waiting] == [1]
    assert time.monotonic() - began < 5


async def test_waiting_finds_a_lease_that_runs_out(site):
    await site.client.submit_prompts(prompts("a"))
    await leased(site, 1, lease_s=0.1)
    began = time.monotonic()
    assert [lease.returns for lease in await site.client.lease_trees(1, wait_s=60)] == [1]
    assert time.monotonic() - began < 6


async def test_waiting_in_vain_returns_empty_in_time(site):
    began = time.monotonic()
    assert await site.client.lease_trees(1, wait_s=0.2) == []
    assert 0.2 <= time.monotonic() - began < 5


async def test_a_call_that_left_while_waiting_leases_nothing(site):
    site.engine.go_on.clear()
    waiting = asyncio.create_task(site.client.lease_trees(1, wait_s=60))
    await site.client.submit_prompts(prompts("a"))
    await until(lambda: site.engine.running)
    waiting.cancel()
    await asyncio.sleep(0.05)  # for the server to hear of it
    site.engine.go_on.set()
    (lease,) = await leased(site, 1)
    assert lease.returns == 0


async def test_a_lost_lease_is_named(site):
    await site.client.submit_prompts(prompts("a"))
    (lease,) = await leased(site, 1, lease_s=0.05)
    await asyncio.sleep(0.1)
    for call in (site.client.ack_trees, site.client.nack_trees, site.client.extend_lease):
        with pytest.raises(RpcFailed, match=lease.lease_id) as caught:
            await call([lease.lease_id])
        assert caught.value.code is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("broken", [["a"], ["b"], ["a", "b", "c"]], ids="".join)
async def test_bytes_that_are_no_tree_are_dead_with_the_reason_and_the_others_are_leased(
    site, broken
):
    """A disk may return such bytes; in the same call as whole ones, and alone."""

    def spoil(journal: Journal) -> None:
        for id_ in broken:
            seq = "(SELECT seq FROM trees WHERE id = ?)"
            journal.database.connection.execute(
                f"UPDATE parts SET data = ? WHERE seq = {seq}", (b"\xff" * 40, id_)
            )

    await site.client.submit_prompts(prompts("a", "b", "c"))
    async with asyncio.timeout(10):
        while (await site.client.queue_stats()).graded < 3:
            await asyncio.sleep(0.01)
    await site.journal(spoil)
    leases = await site.client.lease_trees(3, wait_s=0)
    assert {lease.tree.tree_id for lease in leases} == {"a", "b", "c"} - set(broken)
    assert await site.client.queue_stats() == QueueStats(leased=len(leases), dead=len(broken))
    for id_ in broken:
        (reason,) = await site.journal(Journal.reasons, id_)
        assert reason.startswith("the journal's 40 bytes are no tree: ")
    await site.still_serves()


async def test_failing_growths_are_tried_again_and_then_dead(site):
    def fail(ids, number):
        raise GrowthError("no luck")

    written, site.engine.write = site.engine.write, fail
    await site.client.submit_prompts(prompts("a"))

    async with asyncio.timeout(10):
        while await site.client.queue_stats() != QueueStats(dead=1):
            await asyncio.sleep(0.01)
    assert await site.journal(Journal.reasons, "a") == ["GrowthError: no luck"] * 3
    site.engine.write = written
    await site.still_serves()


async def test_a_restart_grows_what_was_growing(tmp_path):
    async with Site(tmp_path) as site:
        site.engine.go_on.clear()
        await site.client.submit_prompts(prompts(*"abcdefgh"))
        await until(lambda: len(site.engine.running) == 12)
        stats = await site.client.queue_stats()
        assert (stats.growing, stats.queued) == (4, 4)
    journal = Journal(tmp_path / "j.sqlite")
    assert len(journal.take(99)) == 8
    journal.close()
    async with Site(tmp_path) as site:
        leases = await leased(site, 8)
        assert sorted(lease.tree.tree_id for lease in leases) == list("abcdefgh")


async def test_a_pushed_version_serves_and_labels_tokens(site):
    before = await site.client.get_weights()
    assert (before.version, before.state, before.digest) == (0, "serving", b"")
    assert (before.model_id, before.dtype) == (MODEL_ID, "F32")
    version = version_of(site.weights.folder, 5)
    outcome = await site.client.push_weights(version.manifest, version.path)
    assert (outcome.version, outcome.state) == (5, "serving") and outcome.pause_s > 0
    site.weights.check(5)
    after = await site.client.get_weights()
    assert (after.version, after.digest) == (5, version.manifest.digest)
    again = await site.client.push_weights(version.manifest, version.path)
    assert (again.version, again.pause_s) == (5, 0.0)
    tree = await site.client.sample_tree(prompt())
    assert {v for step in tree.steps for v in step.versions} == {5}


async def test_a_push_by_the_synchronous_client_of_many_chunks(site, monkeypatch):
    monkeypatch.setattr("ibtree.wire.messages.SENT_BYTES", 50)
    version = version_of(site.weights.folder, 5)

    def push():
        with Client(site.target, timeout_s=20) as client:
            return client.push_weights(version.manifest, version.path)

    assert (await asyncio.to_thread(push)).version == 5
    site.weights.check(5)


async def test_trees_grow_on_while_a_version_is_applied(site):
    site.engine.half_way.clear()
    version = version_of(site.weights.folder, 5)
    push = asyncio.create_task(site.client.push_weights(version.manifest, version.path))
    await until(lambda: site.engine.updating)
    trees = [asyncio.create_task(site.client.sample_tree(prompt(id=f"{i}"))) for i in range(3)]
    await asyncio.sleep(0.05)
    assert not any(tree.done() for tree in trees)
    assert (await site.client.get_weights()).version == 0
    site.engine.half_way.set()
    await push
    for tree in await asyncio.gather(*trees):
        assert {v for step in tree.steps for v in step.versions} == {5}
