"""What updates do to rollouts in flight: they go on and span versions, or they are waited for."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from ibtree.tree.options import SamplingOptions
from tests.server_ext.fakes import until
from tests.server_ext.site import Site, prompt
from tests.server_ext.versions import Served, version_of

SAMPLING = SamplingOptions()


async def rolling(served: Served, number: int) -> asyncio.Task:
    engine = served.engine
    rollout = asyncio.create_task(engine.generate(f"tree/{number}", [65], SAMPLING, 100))
    await until(lambda: f"tree/{number}" in engine.running)
    return rollout


async def test_a_rollout_goes_on_with_the_new_weights(served):
    """It is not waited for; each token keeps its version."""
    served.engine.go_on.clear()
    rollout = await rolling(served, 1)
    await served.push(3)
    later = await rolling(served, 2)
    await served.push(4)
    served.check(4)
    served.engine.go_on.set()
    first, second = await rollout, await later
    assert list(dict.fromkeys(first.versions)) == [0, 3, 4]
    assert list(dict.fromkeys(second.versions)) == [3, 4]
    assert len(first.versions) == len(first.token_ids) == len(first.logprobs)


async def test_draining_waits_for_the_rollouts(tmp_path):
    served = Served(tmp_path, "drain")
    served.engine.go_on.clear()
    rollout = await rolling(served, 1)
    push = asyncio.create_task(served.push(3))
    await until(lambda: served.updater.state == "staged")
    late = asyncio.create_task(served.engine.generate("tree/2", [65], SAMPLING, 100))
    await asyncio.sleep(0.02)
    assert served.engine.updates == [] and "tree/2" not in served.engine.running
    served.engine.go_on.set()
    await push
    served.check(3)
    assert set((await rollout).versions) == {0}
    assert set((await late).versions) == {3}


@pytest.mark.parametrize("switch", ["interrupt", "drain"])
async def test_no_rollout_begins_with_half_a_version(tmp_path, switch):
    served = Served(tmp_path, switch)
    served.engine.half_way.clear()
    push = asyncio.create_task(served.push(3))
    await until(lambda: served.engine.updating)
    late = asyncio.create_task(served.engine.generate("tree/2", [65], SAMPLING, 100))
    await asyncio.sleep(0.02)
    assert not served.engine.running
    served.engine.half_way.set()
    await push
    assert set((await late).versions) == {3}


@pytest.mark.parametrize("switch", ["interrupt", "drain"])
async def test_updates_while_trees_grow_lose_nothing(tmp_path, switch):
    """100 updates; along every path versions only grow, and draining none falls into a rollout."""
    async with Site(tmp_path, switch=switch) as site:
        stop, trees = asyncio.Event(), []

        async def grow() -> None:
            while not stop.is_set():
                trees.append(await site.client.sample_tree(prompt()))

        growers = [asyncio.create_task(grow()) for _ in range(4)]
        for number in range(1, 101):
            version = version_of(tmp_path, number)
            await site.updater.push(version.manifest, version.source())
        stop.set()
        await asyncio.gather(*growers)
        assert site.updater.serving.version == 100
        assert len(trees) > 10
        spanning = 0
        for tree in trees:
            tree.validate()
            assert switch == "interrupt" or all(len(set(s.versions)) <= 1 for s in tree.steps)
            for end in tree.end_nodes():
                path = [v for node in tree.path(end) for v in tree.steps[node].versions]
                assert all(a <= b for a, b in pairwise(path))
                spanning += len(set(path)) > 1
        assert spanning
