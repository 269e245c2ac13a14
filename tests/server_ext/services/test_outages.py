"""What is down must not burn what is queued: grader, engine, cache, disk, learner."""

from __future__ import annotations

import asyncio
import logging

import grpc
import pytest

from ibtree.client import RpcFailed
from ibtree.messages import QueueStats, TreeChoice
from server_ext.errors import (
    EngineError,
    GraderUnavailableError,
    GradingRefusedError,
    NoReplyError,
)
from server_ext.queue import breaker, states
from server_ext.queue.intake import Bounds
from server_ext.queue.journal import Journal
from tests.server_ext.fakes import until
from tests.server_ext.site import DEFAULTS, Site, prompt
from tests.server_ext.versions import version_of

G = DEFAULTS.trajectories


class Remote:
    """A grader whose service may be away, or refuse."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.asked = 0

    def check(self, answer: str) -> None:
        pass

    async def grade(self, submission) -> float:
        self.asked += 1
        if self.error:
            raise self.error
        return 1.0


@pytest.fixture
def remote():
    return Remote()


@pytest.fixture
async def site(tmp_path, remote, monkeypatch):
    """Pauses are 20 times shorter."""
    monkeypatch.setattr(states, "_FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(breaker, "_FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(breaker, "_LONGEST_PAUSE_S", 0.4)
    async with Site(tmp_path, graders={"remote": remote}) as site:
        yield site


def prompts(count: int, run: str = "run", grader: str = "remote"):
    return [prompt(f"Question {n}?", f"{run}/{n}", grader) for n in range(count)]


async def stats_are(site: Site, timeout_s: float = 20.0, **expected: int) -> QueueStats:
    async with asyncio.timeout(timeout_s):
        while True:
            stats = await site.client.queue_stats()
            if all(getattr(stats, name) == value for name, value in expected.items()):
                return stats
            await asyncio.sleep(0.01)


async def test_a_reward_service_that_is_down_burns_nothing(site, remote, caplog):
    """200 prompts and an outage of many breaths: today all are dead within seconds."""
    remote.error = GraderUnavailableError("the reward service is away")
    await site.client.submit_prompts(prompts(200))
    await until(lambda: site.metric("queue_held", reason="away") == 1.0)
    await asyncio.sleep(2.0)
    stats = await site.client.queue_stats()
    assert (stats.queued + stats.growing, stats.dead) == (200, 0)
    assert stats.holds == ("away",)
    # those that grew when it went away, then one a pause
    assert len(site.engine.requests) < 30 * G
    assert any("'remote' is away" in record.getMessage() for record in caplog.records)
    remote.error = None
    stats = await stats_are(site, graded=200)
    assert stats.holds == () and site.metric("queue_held", reason="away") == 0.0
    assert site.metric("growths_total", outcome="graded") == 200
    assert site.metric("growths_total", outcome="dead") == 0
    assert site.metric("growths_total", outcome="interrupted") > 0
    assert any("taken again" in record.getMessage() for record in caplog.records)


async def test_an_engine_that_is_away_burns_nothing(site):
    def away(ids, number):
        raise EngineError("the scheduler does not answer")

    written, site.engine.write = site.engine.write, away
    await site.client.submit_prompts(prompts(40))
    await until(lambda: site.metric("queue_held", reason="away") == 1.0)
    await asyncio.sleep(0.5)
    assert (await site.client.queue_stats()).dead == 0
    reasons = await site.journal(Journal.reasons, "run/0")
    assert set(reasons) == {"EngineError: the scheduler does not answer"}
    site.engine.write = written
    await stats_are(site, graded=40)


async def test_what_the_service_refuses_is_the_trees_own_fault(site, remote):
    remote.error = GradingRefusedError("INVALID_ARGUMENT: no such problem")
    await site.client.submit_prompts(prompts(4))
    await stats_are(site, dead=4)
    assert site.metric("queue_held", reason="away") == 0.0
    remote.error = None
    revived = await site.client.revive_trees(TreeChoice(ids=("run/0", "run/2")))
    assert revived == 2
    await stats_are(site, dead=2, graded=2)


async def test_our_own_mistake_counts_against_a_tree_only_if_others_grow(site, remote, monkeypatch):
    # whether another tree ends between two of its failures is chance: rests must not eat the time
    monkeypatch.setattr("server_ext.queue.journal.pause_s", lambda times: 0.05)
    remote.error = ZeroDivisionError("a bug")
    await site.client.submit_prompts(prompts(6))
    await asyncio.sleep(1.5)
    assert (await site.client.queue_stats()).dead == 0
    remote.error = None
    await stats_are(site, graded=6)

    written = site.engine.write

    def bad_for_one(ids, number):
        if site.tokenizer.decode(ids).startswith("Question 0?"):
            raise ZeroDivisionError("a bug that this prompt alone meets")
        return written(ids, number)

    site.engine.write = bad_for_one
    await site.client.submit_prompts(prompts(30, "next"))
    for turn in range(80):  # others grow meanwhile
        more = [prompt("Something else?", f"more/{turn}-{n}", "remote") for n in range(8)]
        await site.client.submit_prompts(more)
        await asyncio.sleep(0.1)
        stats = await site.client.queue_stats("next")
        if stats.dead and not stats.queued + stats.growing:
            break
    assert (stats.dead, stats.graded) == (1, 29)


async def test_an_account_that_got_lost_keeps_the_tree(site, monkeypatch):
    """The cache did not say what the tree reused: the tree itself is finished."""

    async def silent(name):
        raise NoReplyError("the radix cache did not answer")

    monkeypatch.setattr(site.engine.trees, "close", silent)
    await site.client.submit_prompts(prompts(3))
    await stats_are(site, graded=3)
    (lease, *_) = await site.client.lease_trees(3)
    assert lease.tree.trajectories == G
    assert site.metric("lost_accounts_total") == 3
    assert (await site.client.sample_tree(prompt("What?", grader="remote"))).trajectories == G


def set_room(site: Site, pages: int | None):
    def limit(journal: Journal) -> None:
        db = journal.database.connection
        most = pages if pages is not None else 2**30
        db.execute(f"PRAGMA max_page_count = {most}")

    return site.journal(limit)


async def test_a_full_disk_loses_no_tree_and_ends_no_server(site, caplog):
    """SQLite's own "database or disk is full": growing pauses, leasing and acking go on."""
    await site.client.submit_prompts(prompts(4, "before"))
    await stats_are(site, graded=4)
    held = await site.client.lease_trees(2, lease_s=60)
    site.engine.go_on.clear()
    await site.client.submit_prompts(prompts(8))
    await until(lambda: len(site.engine.running) == 12)
    await set_room(site, 1)
    site.engine.go_on.set()
    await until(lambda: site.metric("queue_held", reason="disk") == 1.0)
    with pytest.raises(RpcFailed, match=r"disk .* is full") as caught:
        big = [prompt("x" * 400, f"big/{n}") for n in range(1000)]
        await site.client.submit_prompts(big, timeout_s=1.0)
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    stats = await site.client.queue_stats()
    assert stats.holds == ("disk",) and stats.growing + stats.queued == 8
    assert not site.producing.done()
    await site.client.ack_trees([lease.lease_id for lease in held])
    await site.client.extend_lease([], lease_s=5)
    more = await site.client.lease_trees(1)
    await site.client.nack_trees([more[0].lease_id], "only looking")
    await set_room(site, None)
    await stats_are(site, graded=2 + 8, acked=2)
    growths = {name.rpartition("/")[0] for name in site.engine.requests if name.startswith("run/")}
    assert len(growths) == 8  # those that had grown were stored, not grown again
    assert site.metric("queue_held", reason="disk") == 0.0
    assert not site.producing.done()


async def test_too_little_room_pauses_growing_alone(tmp_path):
    free: list[int] = []
    async with Site(tmp_path, bounds=Bounds(min_free_bytes=2**60)) as site:
        await site.client.submit_prompts(prompts(3, grader="exact"))
        await until(lambda: site.metric("queue_held", reason="disk") == 1.0)
        await asyncio.sleep(0.2)
        assert not site.engine.requests
        assert (await site.client.queue_stats()).holds == ("disk",)
        assert (await site.client.sample_tree(prompt())).trajectories == G
        free.append(await site.journal(lambda journal: journal.database.free_bytes()))
    assert 0 < free[0] < 2**60


async def test_a_backlog_holds_its_own_run_alone(tmp_path):
    async with Site(tmp_path, bounds=Bounds(max_graded=3)) as site:
        await site.client.submit_prompts(prompts(20, "idle", grader="exact"))
        await stats_are(site, graded=3)
        await until(lambda: site.metric("queue_held", reason="backlog") == 1.0)
        await site.client.submit_prompts(prompts(10, "busy", grader="exact"))
        for _ in range(10):
            (lease,) = await site.client.lease_trees(1, wait_s=10, run="busy")
            await site.client.ack_trees([lease.lease_id])
        assert (await site.client.queue_stats("idle")).graded == 3
        assert (await site.client.queue_stats("idle")).queued == 17
        await site.client.lease_trees(2, run="idle")
        async with asyncio.timeout(10):
            while (await site.client.queue_stats("idle")).queued > 15:
                await asyncio.sleep(0.01)


async def test_trees_of_old_weights_hold_their_run_until_they_are_leased(tmp_path):
    async with Site(tmp_path, bounds=Bounds(max_weight_lag=1)) as site:
        await site.client.submit_prompts(prompts(2, grader="exact"))
        await stats_are(site, graded=2)
        for version in (1, 2):
            pushed = version_of(site.weights.folder, version)
            await site.client.push_weights(pushed.manifest, pushed.path)
        more = [prompt("More?", f"run/{n}") for n in range(2, 5)]
        await site.client.submit_prompts(more)
        await until(lambda: site.metric("queue_held", reason="weight_lag") == 1.0)
        await site.client.submit_prompts(prompts(2, "other", grader="exact"))
        await stats_are(site, graded=4)
        assert (await site.client.queue_stats("run")).queued == 3
        assert len(await site.client.lease_trees(2, run="run")) == 2
        await stats_are(site, graded=5)
        assert site.metric("queue_held", reason="weight_lag") == 0.0


async def test_cancelled_prompts_grow_no_further(site):
    site.engine.go_on.clear()
    await site.client.submit_prompts([*prompts(8), *prompts(2, "other")])
    await until(lambda: len(site.engine.running) == 12)
    assert await site.client.cancel_prompts(TreeChoice(run="run")) == 8
    stats = await site.client.queue_stats("run")
    assert (stats.queued, stats.growing) == (0, 0)
    again = [prompt("Something else?", "run/0", "remote")]
    assert await site.client.submit_prompts(again) == (1, 0)
    site.engine.go_on.set()
    await stats_are(site, graded=3, queued=0, growing=0, dead=0)
    leases = await site.client.lease_trees(9)
    found = {lease.tree.tree_id: lease.tree.prompt for lease in leases}
    assert found["run/0"] == site.tokenizer.encode("Something else?")
    await until(lambda: not site.engine.running)


async def test_two_runs_neither_get_nor_kill_each_others_trees(site):
    """Both lease for as long as there is something, and give back what is not theirs."""
    await site.client.submit_prompts([*prompts(6, "one"), *prompts(6, "two")])
    for run in ("one", "two"):
        got = []
        while len(got) < 6:
            got += await site.client.lease_trees(6 - len(got), wait_s=10, run=run)
        assert {lease.tree.tree_id for lease in got} == {f"{run}/{n}" for n in range(6)}
        await site.client.ack_trees([lease.lease_id for lease in got])
    assert await site.client.queue_stats() == QueueStats(acked=12)


async def test_reasons_and_ids_stay_on_their_line(site, remote, caplog):
    caplog.set_level(logging.INFO)
    remote.error = GradingRefusedError("first\nERROR forged: second\x1b[2J")
    odd = "run\nERROR forged/\x1b[2J1"
    await site.client.submit_prompts([prompt("Question?", odd, "remote")])
    await stats_are(site, dead=1)
    for record in caplog.records:
        if record.name.startswith("server_ext.queue"):
            assert record.getMessage().isprintable(), record.getMessage()
