"""Calls that take long: quiet connections stay open, and the stream says what goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from ibtree.client.channel import CHANNEL_OPTIONS
from ibtree.messages import Progress
from ibtree.tree import Tree
from server_ext.rewards import remote
from server_ext.services import channel, sampling
from tests.server_ext import site as site_module
from tests.server_ext.fakes import until
from tests.server_ext.site import DEFAULTS, Site, prompt

SHORTER = 300
"""How many times shorter the clocks run here: the client's 30 seconds are a tenth of one."""


def shortened(
    options: list[tuple[str, object]], shorter: int = SHORTER
) -> list[tuple[str, object]]:
    return [
        (name, int(value) // shorter if name.endswith("_ms") else value)  # type: ignore[call-overload]
        for name, value in options
    ]


@pytest.mark.parametrize(
    "options",
    [channel.SERVER_OPTIONS, CHANNEL_OPTIONS, remote._OPTIONS],
    ids=["server", "client", "grader"],
)
def test_the_library_knows_every_option(options):
    """gRPC takes any name and ignores what it does not know."""
    (library,) = Path(grpc.__file__).parent.glob("_cython/cygrpc*.so")
    names = library.read_bytes()
    unknown = [name for name, _ in options if name.encode() + b"\0" not in names]
    assert not unknown


async def test_a_quiet_call_is_not_cut_off(tmp_path, monkeypatch):
    """A tree of ten quiet minutes, with the client's and the server's own options, 300 times
    shorter: pings in a stream without data ended it with GOAWAY, and it began anew for ever."""
    monkeypatch.setattr(site_module, "SERVER_OPTIONS", shortened(channel.SERVER_OPTIONS))
    # gRPC sends a ping a minute after the first two without data, a clock that cannot be shortened
    often = ("grpc.http2.max_pings_without_data", 0)
    client_options = [*shortened(CHANNEL_OPTIONS), often]
    monkeypatch.setattr("ibtree.client.asynchronous.CHANNEL_OPTIONS", client_options)
    monkeypatch.setattr(sampling, "_PROGRESS_S", 1000.0)
    async with Site(tmp_path) as site:
        site.engine.go_on.clear()
        growing = asyncio.create_task(site.client.sample_tree(prompt(), timeout_s=60))
        await until(lambda: len(site.engine.running) == DEFAULTS.init_rollouts)
        await asyncio.sleep(600 / SHORTER)
        assert not growing.done()
        assert len(site.engine.requests) == DEFAULTS.init_rollouts  # it was not begun anew
        site.engine.go_on.set()
        assert (await growing).trajectories == DEFAULTS.trajectories


@pytest.mark.parametrize("tree_only", [True, False])
async def test_quiet_times_are_told(tmp_path, monkeypatch, tree_only):
    monkeypatch.setattr(sampling, "_PROGRESS_S", 0.05)
    async with Site(tmp_path) as site:
        site.engine.go_on.clear()
        events = site.client._sampled(prompt(), False, tree_only, 30.0)
        seen = [await anext(events) for _ in range(5)]
        assert all(isinstance(event, Progress) for event in seen)
        last = seen[-1]
        assert last.rollouts_in_flight == DEFAULTS.init_rollouts
        assert last.generated_tokens == 3 * DEFAULTS.init_rollouts  # what the fake engine says
        assert (last.trajectories, last.target_trajectories) == (0, DEFAULTS.trajectories)
        assert 0.15 < last.elapsed_s < 10
        site.engine.go_on.set()
        rest = [event async for event in events]
        assert isinstance(rest[-1], Tree)


async def test_a_call_that_waits_for_its_turn_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "_PROGRESS_S", 0.05)
    async with Site(tmp_path, max_calls=1) as site:
        site.engine.go_on.clear()
        first = asyncio.create_task(site.client.sample_tree(prompt()))
        await until(lambda: len(site.engine.running) == DEFAULTS.init_rollouts)
        event = await anext(aiter(site.client.sample_events(prompt())))
        assert isinstance(event, Progress) and event.rollouts_in_flight == 0
        site.engine.go_on.set()
        await first


async def test_rollouts_have_seeds_of_their_own(tmp_path):
    """SGLang's deterministic mode samples all requests without a seed with the same one."""
    async with Site(tmp_path) as site:
        tree = await site.client.sample_tree(prompt(seed=2**63 - 2))
        assert tree.ledger.seed == 2**63 - 2 and tree.options.seed == 2**63 - 2
        assert sorted(site.engine.seeds) == [
            *range(DEFAULTS.trajectories - 2),
            2**63 - 2,
            2**63 - 1,
        ]
        drawn = [(await site.client.sample_tree(prompt())).ledger.seed for _ in range(2)]
        assert drawn[0] != drawn[1]
