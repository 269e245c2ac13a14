"""`make bench-engine [MODEL=DIR]`: what the engine's parts give on a CPU, ours beside SGLang's.

Parts can be named on the command line: attention, sampler, decode, growth, arith_growth, demo.
`decode` and `growth` need MODEL, a real instruct model of about half a billion parameters. Arms
take turns; figures are medians of the rounds' ratios, so that whatever else the machine does hits
all arms. Attention has the shapes of Qwen2.5-0.5B (attention_batches.py): every arm goes through
all layers, whose pool is larger than any cache.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import server_ext.engine.cpu  # isort: skip

server_ext.engine.cpu.select()  # before torch: what the engine's processes have

import engine_figures
import numpy as np
import torch
from attention_batches import DIM, HEADS, KV_HEADS, Batch, Pool, alone, trees
from figures import show
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch

from server_ext.attention import paged
from server_ext.attention.plan import Plan, decode_queries, forest, unshared
from server_ext.engine.sampler_cpu import Rules, log_normalizer, sample

OUT = Path(__file__).parent / "out" / "engine.json"
SLOTS = 65_536
TOKEN_BYTES = 2 * KV_HEADS * DIM * 2  # of a layer's keys and values

Arm = Callable[[], object]


VOCABULARY = 151_936


def main() -> None:
    torch.set_num_threads(1)
    model = os.environ.get("MODEL", "")
    parts: dict[str, Callable[[], dict[str, float]]] = {
        "attention": attention,
        "sampler": sampler,
        "arith_growth": engine_figures.arith_growth,
        "demo": engine_figures.demo,
    }
    if model:
        parts["decode"] = lambda: engine_figures.decode(Path(model))
        parts["growth"] = lambda: engine_figures.growth(Path(model))
    wanted = sys.argv[1:] or list(parts)
    if unknown := sorted(set(wanted) - set(parts)):
        sys.exit(f"bench-engine: no part {unknown[0]}; {', '.join(parts)} (with MODEL=DIR all)")
    figures: dict[str, float] = json.loads(OUT.read_text()) if OUT.exists() else {}
    for name in wanted:
        figures |= parts[name]()
        show("engine, CPU", figures, OUT)
    if not model and not sys.argv[1:]:
        print("decode and growth left out: they need MODEL=DIR, the folder of an instruct model")


def attention() -> dict[str, float]:
    pool = Pool(SLOTS)
    return {**alone_figures(pool), **tree_figures(pool)}


def sampler() -> dict[str, float]:
    """A step's sampling with its log-probabilities: 32 rows, top-p 0.95, top-k 20."""
    rows = 32
    logits = 3 * torch.randn(rows, VOCABULARY)
    rules = Rules(
        torch.full((rows,), 20, dtype=torch.int32), torch.full((rows,), 0.95), torch.zeros(rows)
    )

    def ours() -> None:
        scaled = logits / 0.7
        normalizer = log_normalizer(scaled)
        tokens = sample(scaled, normalizer, rules)
        scaled.gather(1, tokens.long().view(-1, 1)).sub_(normalizer)

    def stock() -> None:
        scaled = logits / 0.7
        scaled[:] = torch.softmax(scaled, dim=-1)
        tokens = top_k_top_p_min_p_sampling_from_probs_torch(
            scaled, rules.top_k, rules.top_p, rules.min_p, False, None, torch.zeros(rows)
        )
        torch.log(scaled).gather(1, tokens.long().view(-1, 1))

    found = rounds({"ours": ours, "stock": stock}, 7)
    return {
        "sampler_speedup": ratio(found, "stock", "ours"),
        "sampler_ms": 1e3 * statistics.median(found["ours"]),
    }


def alone_figures(pool: Pool) -> dict[str, float]:
    """Sequences that share nothing, at random slots."""
    many, one = alone(pool, 32, 300), alone(pool, 1, 300)
    ours = rounds({"ours": kernel(pool, many), "read": plain_read(pool, many.tokens)}, 30)
    both = rounds({"ours": kernel(pool, many), "native": native(pool, many)}, 5)
    single = rounds({"ours": kernel(pool, one), "native": native(pool, one)}, 10)
    layers = len(pool.k)
    return {
        "decode_speedup": ratio(both, "native", "ours"),
        "plain_attention_ratio": ratio(single, "native", "ours"),
        "bandwidth_share": ratio(ours, "read", "ours"),
        "decode_ms_per_layer": 1e3 * statistics.median(ours["ours"]) / layers,
        "read_gb_per_s": 1e-9
        * layers
        * many.tokens
        * TOKEN_BYTES
        / statistics.median(ours["read"]),
    }


def tree_figures(pool: Pool) -> dict[str, float]:
    """Rollouts of trees: the same kernel with and without sharing."""
    batch = trees(pool, number=8, in_flight=8, prompt=512)
    plan = forest(batch.table, batch.rows, batch.lengths)
    arms = {
        "shared": kernel(pool, batch, plan),
        "alone": kernel(pool, batch),
        "plan": lambda: forest(batch.table, batch.rows, batch.lengths),
    }
    found = rounds(arms, 20)
    limit = batch.tokens / batch.unique_tokens
    speedup = ratio(found, "alone", "shared")
    return {
        "tree_speedup": speedup,
        "tree_speedup_limit": limit,
        "tree_speedup_share": speedup / limit,
        "tree_ms_per_layer": 1e3 * statistics.median(found["shared"]) / len(pool.k),
        "tree_plan_ms": 1e3 * statistics.median(found["plan"]),
    }


def kernel(pool: Pool, batch: Batch, plan: Plan | None = None) -> Arm:
    plan = plan or unshared(batch.rows)
    queries = decode_queries(plan, batch.lengths)
    q = torch.randn(len(batch.rows), HEADS, DIM).bfloat16()
    out = torch.empty_like(q)

    def run() -> None:
        for k, v in zip(pool.k, pool.v, strict=True):
            paged.attend(q, k, v, out, batch.table, plan, queries, DIM**-0.5)

    return run


def native(pool: Pool, batch: Batch) -> Arm:
    """SGLang's torch_native."""
    backend = TorchNativeAttnBackend.__new__(TorchNativeAttnBackend)
    rows, lengths = torch.from_numpy(batch.rows), torch.from_numpy(batch.lengths)
    q = torch.randn(len(batch.rows), HEADS, DIM).bfloat16()
    out = torch.empty_like(q)

    def run() -> None:
        for k, v in zip(pool.k, pool.v, strict=True):
            backend._run_sdpa_forward_decode(
                q, out, k, v, batch.table, rows, lengths, scaling=DIM**-0.5, enable_gqa=True
            )

    return run


def plain_read(pool: Pool, tokens: int) -> Arm:
    """As many bytes of each layer, in order, by a sum of integers; other ones each time."""
    numbers = tokens * TOKEN_BYTES // 2 // 8
    flat = [x.view(-1).view(torch.int64) for kv in zip(pool.k, pool.v, strict=True) for x in kv]
    starts = np.random.default_rng(2)

    def run() -> None:
        start = int(starts.integers(len(flat[0]) - numbers))
        for x in flat:
            x[start : start + numbers].sum()

    return run


def rounds(arms: dict[str, Arm], number: int) -> dict[str, list[float]]:
    """Seconds of each arm in each round, after one that does not count."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(number + 1):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            found[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in found.items()}


def ratio(found: dict[str, list[float]], above: str, below: str) -> float:
    return statistics.median(a / b for a, b in zip(found[above], found[below], strict=True))


if __name__ == "__main__":
    sys.exit(main())
