"""What the operator allows, and what happens when too much comes at once."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import grpc
import pytest

from ibtree import Client
from ibtree.client import RpcFailed
from ibtree.errors import FieldError
from ibtree.tree.options import TreeOptions, changed, options_from
from ibtree.wire.messages import prompt_to_proto
from ibtree.wire.v1 import sampling_pb2
from server_ext.config import ServerConfig
from server_ext.trees.limits import Limits
from tests.server_ext.fakes import until
from tests.server_ext.site import DEFAULTS, Site, prompt

FULL = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("limits", "asked", "words"),
    [
        (
            Limits(trajectories=5),
            {},
            "options.rounds: the shape asks for 6 .* --limit-trajectories",
        ),
        (Limits(new_tokens=63), {}, "sampling.max_new_tokens: got 64; .* 63 .*--limit-new-tokens"),
        (Limits(temperature=0.9), {}, "sampling.temperature: got 1; .* 0.9 .*--limit-temperature"),
        (Limits(deadline_s=5), {"deadline_s": 5.5}, "deadline_s: got 5.5; .*--limit-deadline-s"),
    ],
)
def test_more_than_allowed_is_refused(limits, asked, words):
    with pytest.raises(FieldError, match=words):
        limits.applied(changed(DEFAULTS, **asked))


def test_what_is_allowed_passes_and_the_longest_deadline_is_given():
    limits = Limits(6, new_tokens=64, temperature=1.0, deadline_s=5.0)
    assert limits.applied(DEFAULTS) == changed(DEFAULTS, deadline_s=5.0)
    shorter = changed(DEFAULTS, deadline_s=2.0)
    assert limits.applied(shorter) == shorter
    assert Limits().applied(DEFAULTS) == DEFAULTS


def test_no_setting_of_the_server_is_taken_for_an_option_of_every_tree():
    """Settings with an option's name are its default; a limit must not be one by accident."""
    assert options_from(ServerConfig(model=Path("model"))) == TreeOptions()


async def test_limits_hold_at_the_door(tmp_path):
    async with Site(tmp_path, limits=Limits(40, new_tokens=64, deadline_s=60.0)) as site:
        for call in (
            site.client.sample_tree(prompt(max_new_tokens=65)),
            site.client.submit_prompts([prompt(id="x", max_new_tokens=65)]),
        ):
            with pytest.raises(RpcFailed, match=r"INVALID_ARGUMENT: .*limit-new-tokens"):
                await call
        assert (await site.client.sample_tree(prompt())).options.deadline_s == 60.0


def test_the_servers_own_defaults_must_be_allowed(tmp_path):
    with pytest.raises(FieldError, match="limit-new-tokens"):
        Site(tmp_path, limits=Limits(40, new_tokens=10))


async def call_of(site: Site, id: str) -> grpc.aio.Call:
    request = sampling_pb2.SampleTreeRequest(prompt=prompt_to_proto(prompt(id=id)))
    return site.raw_sampling.SampleTree(request)


async def test_too_many_calls_are_told_when_to_come_back(tmp_path):
    async with Site(tmp_path, max_calls=2, max_waiting_calls=1) as site:
        site.engine.go_on.clear()
        growing = [asyncio.create_task(site.client.sample_tree(prompt(id=f"{i}"))) for i in (1, 2)]
        await until(lambda: site.forest.calls.growing == 2)
        growing.append(asyncio.create_task(site.client.sample_tree(prompt(id="3"))))
        await until(lambda: site.forest.calls.waiting == 1)
        refused = await call_of(site, "4")
        assert await refused.code() is FULL
        hint = dict(await refused.trailing_metadata())["grpc-retry-pushback-ms"]
        assert hint == "1000", "no tree has ended yet: a second"
        assert "1 calls wait" in await refused.details()
        with pytest.raises(RpcFailed) as caught:
            await site.client.sample_tree(prompt(id="5"), timeout_s=0.5)
        assert (caught.value.code, caught.value.retry_after_s) == (FULL, 1.0)
        patient = asyncio.create_task(site.client.sample_tree(prompt(id="6"), timeout_s=20))
        site.engine.go_on.set()
        trees = await asyncio.gather(*growing, patient)
        assert [tree.tree_id for tree in trees] == ["1", "2", "3", "6"]
        await site.still_serves()


async def test_a_full_queue_takes_nothing_and_is_tried_again(tmp_path):
    async with Site(tmp_path, max_open_trees=1, max_queued=3) as site:
        site.engine.go_on.clear()
        first = [prompt(id=f"{i}") for i in range(3)]
        await site.client.submit_prompts(first)
        await until(lambda: site.engine.running)  # one grows, two are queued
        with pytest.raises(RpcFailed, match="2 prompts are queued, 2 more do not fit: at most 3"):
            await site.client.submit_prompts([prompt(id="a"), prompt(id="b")], timeout_s=0.5)
        assert (await site.client.queue_stats()).queued == 2
        assert await site.client.submit_prompts([prompt(id="a"), first[1]]) == (1, 1)
        assert await site.client.submit_prompts(first) == (0, 3), "known ones always pass"
        with pytest.raises(RpcFailed, match="prompts: got 4; allowed: 1 to 3"):
            await site.client.submit_prompts([prompt(id=f"c{i}") for i in range(4)])

        def submit() -> tuple[int, int]:
            with Client(site.target) as client:
                return client.submit_prompts([prompt(id="b"), prompt(id="c")], timeout_s=20)

        waiting = asyncio.create_task(asyncio.to_thread(submit))
        site.engine.go_on.set()
        assert await waiting == (2, 0)


async def test_calls_go_before_queued_prompts(tmp_path):
    """A call that comes when all slots are taken gets the next ones."""
    async with Site(tmp_path, max_rollouts=2) as site:
        site.engine.go_on.clear()
        await site.client.submit_prompts([prompt(id=f"queued{i}") for i in range(4)])
        await until(lambda: len(site.engine.running) == 2)
        call = asyncio.create_task(site.client.sample_tree(prompt(id="mine")))
        await until(lambda: site.forest.calls.growing == 1)
        before = len(site.engine.requests)
        await asyncio.sleep(0.05)  # until its rollouts wait for their turns
        site.engine.go_on.set()
        tree = await call
        mine = [rid.startswith("mine/") for rid in site.engine.requests[before:]]
        first_round = DEFAULTS.init_rollouts
        assert all(mine[:first_round]), site.engine.requests
        assert tree.trajectories == DEFAULTS.trajectories
        leased = await site.client.lease_trees(4, wait_s=10)
        assert leased, "the queued ones are grown too"


async def test_rollouts_in_flight_are_bounded(tmp_path):
    async with Site(tmp_path, max_rollouts=5) as site:
        most = 0
        written = site.engine.write

        def write(ids, number):
            nonlocal most
            most = max(most, len(site.engine.running))
            return written(ids, number)

        site.engine.write = write
        site.engine.go_on.clear()
        calls = [asyncio.create_task(site.client.sample_tree(prompt(id=f"{i}"))) for i in range(12)]
        await until(lambda: site.forest.calls.growing == 4 and len(site.engine.running) == 5)
        site.engine.go_on.set()
        await asyncio.gather(*calls)
        assert most == 5
        assert site.forest.slots.in_flight == 0


async def test_a_deadline_while_rollouts_wait_for_their_turn(tmp_path):
    async with Site(tmp_path, max_rollouts=1) as site:
        site.engine.go_on.clear()
        other = asyncio.create_task(site.client.sample_tree(prompt(id="other")))
        await until(lambda: site.engine.running)
        began = time.monotonic()
        with pytest.raises(RpcFailed, match="no rollout finished"):
            await site.client.sample_tree(prompt(id="mine", deadline_s=0.1))
        assert time.monotonic() - began < 5
        assert not any(rid.startswith("mine") for rid in site.engine.requests)
        site.engine.go_on.set()
        assert (await other).trajectories == DEFAULTS.trajectories
