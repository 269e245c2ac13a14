"""Weight updates on a real engine with trees in flight."""

from __future__ import annotations

import asyncio
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from weights_model import save_model

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "arith"))

from processes import MODEL, running, server_command, wait_until_serving
from task import problems

from ibtree import AsyncClient, Prompt
from ibtree.tree import Tree
from ibtree.tree.options import TreeOptions, changed
from ibtree.weights.delta import write_delta
from ibtree.weights.model_folder import model_identity
from ibtree.weights.tensor_files import make_manifest

TREES = 32
OPTIONS = changed(TreeOptions(), temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=96)
ONE_TOKEN = changed(OPTIONS, init_rollouts=1, rounds=1, max_new_tokens=1)


def engine_figures(folder: Path, parameters: float, updates: int) -> dict[str, float]:
    """Figures of the demo's model in float32, and of the larger one, in bfloat16."""
    save_model(folder / "large", parameters)
    figures = {}
    for name, model in {"": MODEL, "_100m": folder / "large"}.items():
        (folder / f"server{name}").mkdir()
        measured = asyncio.run(_measure(folder / f"server{name}", model, updates))
        figures |= {f"{key}{name}": value for key, value in measured.items()}
    return figures


async def _measure(folder: Path, model: Path, updates: int) -> dict[str, float]:
    line = server_command(folder / "data", "--dtype=bfloat16", model=model)
    with running(line, folder / "log") as process:
        address = await asyncio.to_thread(lambda: wait_until_serving(process).grpc)
        async with AsyncClient(address, timeout_s=120) as client:
            return await _under_load(client, folder, model, updates)


async def _under_load(
    client: AsyncClient, folder: Path, model: Path, updates: int
) -> dict[str, float]:
    stop, trees = asyncio.Event(), list[Tree]()
    asked = [problem.prompt for problem in problems(64, 6, seed=1)]

    async def grow(at: int) -> None:
        while not stop.is_set():
            prompt = Prompt(asked[at % len(asked)], answer="1", options=OPTIONS)
            trees.append(await client.sample_tree(prompt))

    growers = [asyncio.create_task(grow(at)) for at in range(TREES)]
    await asyncio.sleep(5.0)
    pauses_s, pushes_s, first_tokens_s, delta_share = [], [], [], []
    weights = {n: t.to(torch.bfloat16) for n, t in load_file(model / "model.safetensors").items()}
    model_id, base = model_identity(model), folder / "base"
    generator = torch.Generator().manual_seed(0)
    for version in range(1, updates + 2):
        for tensor in weights.values():  # 2 % of the elements move by a unit in the last place
            bits = tensor.view(torch.int16)
            bits += (torch.rand(bits.shape, generator=generator) < 0.02).to(torch.int16)
        whole, delta = folder / "whole", folder / "delta"
        save_file(weights, whole)
        manifest, path = make_manifest(whole, version, model_id), whole
        if version > 1:
            size, path = write_delta(base, whole, delta), delta
            delta_share.append(size / manifest.file_bytes)
            served = await client.get_weights()
            manifest = type(manifest)(
                version, model_id, manifest.tensors, size, served.version, served.digest
            )
        begin = time.monotonic()
        outcome = await client.push_weights(manifest, path)
        if version > 1:  # the first is whole
            pushes_s.append(time.monotonic() - begin)
            pauses_s.append(outcome.pause_s)
            first_tokens_s.append(await _first_token(client, asked[0], version) - begin)
        whole.replace(base)
    stop.set()
    await asyncio.gather(*growers)
    spanning = sum(_checked(tree) for tree in trees)
    return {
        "pause_ms_median": 1e3 * statistics.median(pauses_s),
        "pause_ms_max": 1e3 * max(pauses_s),
        "push_ms_median": 1e3 * statistics.median(pushes_s),
        "first_token_ms_median": 1e3 * statistics.median(first_tokens_s),
        "pushed_share": statistics.median(delta_share),
        "updates": updates,
        "trees": len(trees),
        "trees_spanning_versions": spanning,
    }


async def _first_token(client: AsyncClient, prompt: str, version: int) -> float:
    """The time at which a token of the version was there [monotonic seconds]."""
    while True:
        tree = await client.sample_tree(Prompt(prompt, answer="1", options=ONE_TOKEN))
        if tree.steps[1].versions[0] >= version:
            return time.monotonic()


def _checked(tree: Tree) -> bool:
    """Whether it spans versions. Nothing of it may be missing, nor go back to older weights."""
    tree.validate()
    assert tree.trajectories == OPTIONS.trajectories, "a rollout was lost"
    seen = set()
    for end in tree.end_nodes():
        versions = [v for node in tree.path(end) for v in tree.steps[node].versions]
        assert versions == sorted(versions), "older weights after newer ones"
        seen |= set(versions)
    logprobs = [lp for step in tree.steps for lp in step.logprobs]
    assert all(math.isfinite(lp) for lp in logprobs)
    return len(seen) > 1
