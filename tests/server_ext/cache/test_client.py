"""The server's end of the radix backend, and the forest's use of it."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace

import pytest

from ibtree.messages import CacheAudit
from server_ext.cache import client as tree_cache
from server_ext.cache.audit import Auditor, Score
from server_ext.cache.client import TreeCache
from server_ext.cache.open_trees import OpenTrees
from server_ext.cache.path_trie import Key
from server_ext.errors import NoReplyError
from server_ext.services.metrics import Metrics, serve_metrics
from tests.server_ext.fakes import FakeRank, until
from tests.server_ext.site import Site, prompt


def answer(reply: int, open_trees: int = 1, account: tuple[int, ...] = (1, 2, 3, 4)):
    return SimpleNamespace(
        reply=reply,
        accounts=[account],
        probes=[(reply * 0 + open_trees, 0)],
        open_trees=open_trees,
        protected_tokens=10,
        evicted_tokens=0,
        capacity_tokens=100,
        pool_tokens=200,
        prefill_passes=5,
        joined_requests=7,
        ranks_agree=open_trees != 3,
    )


async def test_ranks_are_added_up():
    sent = []
    cache = TreeCache(lambda **message: sent.append(message), ranks=2)
    asked = asyncio.gather(cache.state(), cache.close("t"), cache.probe([[1]]))
    await asyncio.sleep(0)
    for number in (3, 1, 2):  # in any order
        cache.replied(answer(number, open_trees=1))
        cache.replied(answer(number, open_trees=3))
    state, account, [probe] = await asked
    assert (state.open_trees, state.capacity_tokens, state.ranks_agree) == (4, 200, False)
    assert (account.asked, account.protected) == (2, 8)
    assert probe.cached_tokens == 3
    assert sent[1]["closed"] == ["t"]


async def test_trees_are_spread_over_ranks_and_stay():
    cache = TreeCache(lambda **_: None, ranks=2)
    for name in "abcd":
        cache.open(name)
    assert [cache.rank(name) for name in "abcd"] == [0, 1, 0, 1]
    cache.drop("b")
    cache.open("e")
    assert (cache.rank("e"), cache.rank("b"), cache.rank("a")) == (1, None, 0)
    assert TreeCache(lambda **_: None, ranks=1).rank("a") is None


async def test_no_reply(monkeypatch):
    monkeypatch.setattr(tree_cache, "_REPLY_TIMEOUT_S", 0.01)
    cache = TreeCache(lambda **_: None, ranks=1)
    with pytest.raises(NoReplyError):
        await cache.state()
    cache.replied(answer(1))  # too late: nobody waits, nothing breaks


async def test_what_is_open_is_renewed(monkeypatch):
    monkeypatch.setattr(tree_cache, "_TTL_S", 0.04)
    rank = FakeRank(100)
    rank.cache.open("kept")
    keeping = asyncio.create_task(rank.cache.keep_open())
    await asyncio.sleep(0.2)
    assert len(rank.open) == 1
    keeping.cancel()
    await asyncio.sleep(0.1)
    assert (await rank.cache.state()).open_trees == 0  # the message's clock released it


async def test_a_tree_is_open_while_it_grows_and_released_however_it_ends(tmp_path):
    async with Site(tmp_path) as site:
        rank = site.engine.rank.open
        tree = await site.client.sample_tree(prompt())
        assert len(rank) == 0 and tree.trajectories
        site.engine.go_on.clear()
        events = site.client.sample_events(prompt())
        waiting = asyncio.create_task(anext(events))
        await until(lambda: len(rank) == 1)
        waiting.cancel()
        await until(lambda: len(rank) == 0)


async def test_trees_wait_for_room_in_the_cache(tmp_path):
    async with Site(tmp_path, cache_tokens=1, max_open_trees=4) as site:
        site.engine.go_on.clear()
        growing = [asyncio.create_task(site.client.sample_tree(prompt())) for _ in range(2)]
        await until(lambda: site.engine.running)
        await asyncio.sleep(0.05)
        assert len(site.engine.rank.open) == 1
        site.engine.go_on.set()
        assert all([(await tree).trajectories for tree in growing])


async def test_cache_service(tmp_path):
    async with Site(tmp_path) as site:
        state = await site.client.cache_state()
        assert state.capacity_tokens == site.engine.rank.open.capacity_tokens
        assert await site.client.audit_cache() == CacheAudit()  # nothing grows: nothing compared
        started = asyncio.Event()

        def write(token_ids, number):
            if number >= 4:
                started.set()
                site.engine.go_on.clear()
            return "1\n\n2\n\n#### 1"

        site.engine.write = write
        growing = asyncio.create_task(site.client.sample_tree(prompt()))
        await started.wait()
        audit = await site.client.audit_cache(8)
        assert audit.samples > 0 and audit.prefix_tokens > audit.cached_tokens > 0
        site.engine.go_on.set()
        growing.cancel()


class Broken:
    """An engine that scores warm and cold as told."""

    def __init__(self, warm: Score, cold: Score) -> None:
        self.scores = {False: warm, True: cold}
        self.trees = FakeRank(10).cache

    async def score(self, prefix, token, *, tree="", cold=False):
        return self.scores[cold]


@pytest.mark.parametrize(
    ("warm", "difference"), [(-0.5, 0.25), (math.nan, math.inf), (-math.inf, math.inf)]
)
async def test_an_audit_sees_a_difference(warm, difference):
    prefix = SimpleNamespace(tree="t", token_ids=(1, 2), next_token=3)
    forest = SimpleNamespace(open_prefixes=lambda most: [prefix])
    auditor = Auditor(Broken(Score(warm, 1, 5), Score(-0.25, 0, 5)), forest.open_prefixes)
    assert (await auditor.audit(4)).max_difference == difference


async def test_an_update_in_between_is_no_difference():
    prefix = SimpleNamespace(tree="t", token_ids=(1, 2), next_token=3)
    forest = SimpleNamespace(open_prefixes=lambda most: [prefix])
    auditor = Auditor(Broken(Score(-9.0, 1, 5), Score(-0.25, 0, 6)), forest.open_prefixes)
    assert await auditor.audit(4) == CacheAudit()


async def test_audits_at_a_low_rate_are_reported():
    prefix = SimpleNamespace(tree="t", token_ids=(1, 2), next_token=3)
    forest = SimpleNamespace(open_prefixes=lambda most: [prefix])
    metrics = Metrics()
    engine = Broken(Score(-0.5, 1, 5), Score(-0.25, 0, 5))
    auditor = Auditor(engine, forest.open_prefixes, metrics.audit)
    running = asyncio.create_task(auditor.run(0.005))
    value = metrics.registry.get_sample_value
    await until(lambda: (value("ibtpo_audits_total") or 0) >= 3)
    running.cancel()
    name = "ibtpo_audit_difference_nats"
    assert value(f"{name}_sum") == 0.25 * value(f"{name}_count")
    assert value("ibtpo_audit_stale_tokens_total") == 0


async def test_a_web_port_in_use():
    server, port = serve_metrics(Metrics(), "127.0.0.1:0")
    try:
        with pytest.raises(RuntimeError):
            serve_metrics(Metrics(), f"127.0.0.1:{port}")
    finally:
        server.shutdown()
        server.server_close()


def test_other_decisions_give_another_digest():
    """What the comparison of ranks rests on."""

    def rank(evicted: int) -> int:
        trees = OpenTrees(100)
        trees.open("t", 1.0)
        trees.finished("t/0", Key(_array(5)), 2, 0, node=7)
        for path in trees.evicted(7):
            trees.shortened(path, 5 - evicted, 6)
        return trees.digest

    assert rank(2) == rank(2) != rank(3)


def _array(n: int):
    from array import array

    return array("q", range(n))
