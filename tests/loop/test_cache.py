"""The radix backend in the real server: what trees hold and reuse, the audit, the metrics."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from ibtree import AsyncClient, Client
from ibtree.tree import Tree
from tests.engine import Server, model_weights
from tests.loop.test_engine import prompt


def held(tree: Tree) -> int:
    """Tokens of the prompt and of all trajectories, each once, without their last tokens, which
    are sampled and never computed."""
    paths = {(*tree.prompt, *tree.prefix(end))[:-1] for end in tree.end_nodes()}
    return len({path[:n] for path in paths for n in range(1, len(path) + 1)})


def ibtpo(server: Server, *line: str) -> dict[str, float]:
    script = Path(sys.executable).parent / "ibtpo"
    command = [script, *line, "--server", server.address, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


def metrics(server: Server) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{server.web}/metrics", timeout=10) as response:
        text = response.read().decode()
    found = Counter[str]()  # sums over labels
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] += sample.value
    return found


def test_a_tree_knows_what_it_held_and_reused(server: Server) -> None:
    with Client(server.address) as client:
        before = metrics(server)
        tree = client.sample_tree(prompt(3))
        after = metrics(server)
        state = client.cache_state()
    ledger = tree.ledger
    assert ledger.protected_tokens == held(tree)
    assert ledger.refilled_tokens == 0
    # every branch found all of its prefix but the last token, which is always computed
    assert ledger.cached_tokens >= ledger.prefix_tokens - 8 - 4 * len(tree.prompt)
    assert (state.open_trees, state.protected_tokens) == (0, 0)
    assert 0 < state.capacity_tokens < state.pool_tokens and state.ranks_agree
    for name, value in (
        ("trees", 1),
        ("generated_tokens", ledger.generated_tokens),
        ("prefix_tokens", ledger.prefix_tokens),
        ("cached_tokens", ledger.cached_tokens),
        ("refilled_tokens", 0),
    ):
        assert after[f"ibtpo_{name}_total"] - before[f"ibtpo_{name}_total"] == value


def test_audit_while_trees_grow_and_weights_change(server: Server) -> None:
    """Warm equals cold, before and after an update that nobody flushed the cache for."""

    async def audit() -> dict[str, float]:
        until = time.monotonic() + 30
        while True:  # at a time at which a tree has a first rollout
            found = await asyncio.to_thread(ibtpo, server, "audit-cache", "--samples=8")
            if found["samples"] or time.monotonic() > until:
                return found

    async def grow() -> list[dict[str, float]]:
        audits: list[dict[str, float]] = []
        async with AsyncClient(server.address) as client:

            async def one_after_another(i: int) -> None:
                while len(audits) < 2:
                    (await client.sample_tree(prompt(i))).validate()

            growing = [asyncio.create_task(one_after_another(i)) for i in range(12)]
            for noise in (0.0, 0.05):
                if noise:
                    await asyncio.to_thread(server.push, model_weights(noise))
                audits.append(await audit())
            await asyncio.gather(*growing)
        return audits

    try:
        for audit in asyncio.run(grow()):
            assert audit["samples"] > 0 and audit["stale_tokens"] == 0, audit
            assert audit["cached_tokens"] > 0
            assert audit["max_difference"] < 1e-4
        state = ibtpo(server, "cache")
        assert (state["open_trees"], state["protected_tokens"]) == (0, 0)
    finally:
        server.push_original()


def test_metrics_of_the_cache(server: Server) -> None:
    found = metrics(server)
    assert found["ibtpo_cache_ranks_agree"] == 1
    assert found["ibtpo_cache_capacity_tokens"] > 0
    assert found["ibtpo_cache_protected_tokens"] >= 0


async def test_branches_begin_with_a_decode_step(server: Server) -> None:
    """While others run; each would stop them for a prefill pass of one token."""
    trees = 16
    async with AsyncClient(server.address) as client:
        before = await client.cache_state()
        grown = await asyncio.gather(*(client.sample_tree(prompt(i % 8)) for i in range(trees)))
        after = await client.cache_state()
    branches = trees * 8
    assert all(tree.trajectories == 12 for tree in grown)
    assert after.joined_requests - before.joined_requests > branches / 2
    assert after.prefill_passes - before.prefill_passes < branches / 2
    gaps = await _audited(server)
    assert gaps <= 1e-5


async def _audited(server: Server) -> float:
    """Largest difference between cached and computed while trees grow [nats]."""
    async with AsyncClient(server.address) as client:
        growing = [asyncio.create_task(client.sample_tree(prompt(i))) for i in range(8)]
        audit = await client.audit_cache(16)
        await asyncio.gather(*growing)
    assert audit.stale_tokens == 0
    return audit.max_difference
