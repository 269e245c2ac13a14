"""Updates of the real engine while rollouts run: nothing lost, every token by its own weights."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import MODEL
from safetensors.torch import save_file

from ibtree import AsyncClient, Tree
from ibtree.client import RpcFailed
from ibtree.messages import PushOutcome
from ibtree.weights.delta import write_delta
from ibtree.weights.manifest import Canary, WeightManifest
from ibtree.weights.model_folder import model_identity
from ibtree.weights.tensor_files import make_manifest
from learner.io.canary import canary_of
from tests.engine import Server, Weights, model_weights
from tests.loop.test_engine import prompt, trainer_logprobs
from tests.loop.test_weights import policy

MODEL_ID = model_identity(MODEL)
UPDATES = 100 if os.environ.get("IBTPO_SOAK") else 25
TREES = 16


@asynccontextmanager
async def growing(client: AsyncClient, trees: list[Tree]) -> AsyncIterator[None]:
    """Trees grow all the time and are added to the list."""
    stop = asyncio.Event()

    async def grow(at: int) -> None:
        while not stop.is_set():
            trees.append(await client.sample_tree(prompt(at % 64)))

    growers = [asyncio.create_task(grow(at)) for at in range(TREES)]
    try:
        yield
    finally:
        stop.set()
        await asyncio.gather(*growers)


def drifted(weights: Weights, seed: int, share: float = 0.02) -> Weights:
    """A few elements of each matrix moved, as by a step of training."""
    generator = torch.Generator().manual_seed(seed)
    new = {}
    for name, tensor in weights.items():
        moves = (torch.rand(tensor.shape, generator=generator) < share) * tensor.std() * 0.02
        new[name] = tensor + (moves if tensor.ndim == 2 else 0)
    return new


def by_manifest(
    server: Server, weights: Weights, version: int, canary: Canary | None = None
) -> tuple[WeightManifest, Path]:
    path = server.folder / f"version-{version}.safetensors"
    save_file(weights, path)
    return replace(make_manifest(path, version, MODEL_ID), canary=canary), path


async def push(client: AsyncClient, manifest: WeightManifest, path: Path) -> PushOutcome:
    """As a delta if the file of the version before is there."""
    base_path = path.with_name(f"version-{manifest.version - 1}.safetensors")
    if base_path.is_file():
        delta = path.with_suffix(".delta")
        base = make_manifest(base_path, manifest.version - 1, MODEL_ID)
        size = await asyncio.to_thread(write_delta, base_path, path, delta)
        manifest = replace(
            manifest, file_bytes=size, base_version=base.version, base_digest=base.digest
        )
        base_path.unlink()
        path = delta
    return await client.push_weights(manifest, path)


async def test_updates_with_trees_in_flight_lose_nothing(server: Server) -> None:
    """Every token has the log-probability that the weights of its version give its whole path: no
    KV of older weights, no mix of weights, no token under a wrong number."""
    server.push_original()
    trees = list[Tree]()
    async with AsyncClient(server.address, timeout_s=120) as client:
        first = (await client.get_weights()).version
        weights = {first: model_weights()}
        async with growing(client, trees):
            await asyncio.sleep(1.0)
            for version in range(first + 1, first + 1 + UPDATES):
                weights[version] = drifted(weights[version - 1], version)
                outcome = await push(client, *by_manifest(server, weights[version], version))
                assert outcome.version == version and outcome.pause_s > 0
        kept = (await client.get_weights()).kept
    assert any(one.base_version is not None for one in kept)
    spanning = 0
    for tree in trees:
        tree.validate()
        assert tree.trajectories == 12
        assert all(math.isfinite(lp) for step in tree.steps for lp in step.logprobs)
        for end in tree.end_nodes():
            path = [v for node in tree.path(end) for v in tree.steps[node].versions]
            assert path == sorted(path), "older weights after newer ones"
        spanning += any(len(set(step.versions)) > 1 for step in tree.steps)
    assert spanning, "no rollout was interrupted"
    mixed = [tree for tree in trees if len({v for s in tree.steps for v in s.versions}) > 1]
    for tree in mixed[:: max(1, len(mixed) // 10)]:
        engine = torch.tensor([lp for step in tree.steps for lp in step.logprobs])
        versions = torch.tensor([v for step in tree.steps for v in step.versions])
        for version in set(versions.tolist()):
            expected = torch.tensor(trainer_logprobs(tree, policy(weights[version]), 1.0))
            own = versions == version
            assert (engine[own] - expected[own]).abs().max() < 1e-3
    server.push_original()


async def test_a_canary_and_a_rollback_with_trees_in_flight(server: Server) -> None:
    server.push_original()
    good, trees = model_weights(noise=0.05, seed=1), list[Tree]()
    async with AsyncClient(server.address, timeout_s=120) as client:
        version = (await client.get_weights()).version + 1
        tree = await client.sample_tree(prompt(0))
        canary = canary_of(policy(good), tree, 0.01, torch.float32)
        async with growing(client, trees):
            await client.push_weights(*by_manifest(server, good, version, canary))
            other = model_weights(noise=0.3, seed=2)
            with pytest.raises(RpcFailed, match=f"canary: version {version + 1}") as caught:
                await client.push_weights(*by_manifest(server, other, version + 1, canary))
            assert caught.value.code.name == "FAILED_PRECONDITION"
            assert (await client.get_weights()).version == version
            back = await client.rollback_weights(version - 1) if version > 1 else None
            after = await client.sample_tree(prompt(1))
    seen = {v for one in trees for step in one.steps for v in step.versions}
    if back:
        assert back.version == version + 1
        expected = torch.tensor(trainer_logprobs(after, policy(model_weights()), 1.0))
        engine = torch.tensor([lp for step in after.steps for lp in step.logprobs])
        assert (engine - expected).abs().max() < 1e-3
    else:
        assert version + 1 not in seen
    # what the rejected weights gave is in no tree: its log-probabilities would be far off
    for tree in trees[:: max(1, len(trees) // 10)]:
        engine = torch.tensor([lp for step in tree.steps for lp in step.logprobs])
        under = [
            torch.tensor(trainer_logprobs(tree, policy(w), 1.0)) for w in (model_weights(), good)
        ]
        nearest = torch.stack([(engine - one).abs() for one in under]).amin(0)
        assert nearest.max() < 1e-3
    server.push_original()
