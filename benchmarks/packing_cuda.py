"""The part of bench_packing.py for a GPU: a random model of Qwen3-1.7B's shape in bfloat16.

Packed trees against the same trajectories in the same packs without sharing (padding-free), so
that kernels, head and optimiser are alike. Takes about 110 GB of GPU memory.
"""

from __future__ import annotations

import copy
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from packing_trees import flat_tokens, packed_tokens, single_trajectories, synthetic_tree
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ibtree.tree import Tree
from learner.config import LearnerConfig
from learner.train.model import mend_torchvision
from learner.train.trainer import Trainer
from learner.tree.attention import FlexTreeAttention
from learner.tree.pack import Pack, Piece, drafts, pack, padded
from learner.tree.training import training_trees

mend_torchvision()  # before anything imports transformers

from transformers import Qwen3Config, Qwen3ForCausalLM

PROMPT, TOKENS = 512, 2048
WARM_STEPS, STEPS = 5, 5
DEVICE = torch.device("cuda")


def model_of_1_7b() -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return Qwen3ForCausalLM(config).to(torch.bfloat16).eval()


def seconds(work: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def matmul_rate() -> float:
    """Measured bfloat16 rate of a large matrix product [FLOP/s]."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    for _ in range(5):
        a @ b
    return 2 * 8192**3 / statistics.median(seconds(lambda: a @ b) for _ in range(20))


def step_flops(model: Qwen3ForCausalLM, tree: Tree) -> float:
    """Forward and backward over the unique tokens, without what is computed again."""
    shape = model.config
    heads = shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
    seen = sum(
        len(tree.prompt) + tree.depth_tokens(n) - len(tree.steps[n].token_ids) / 2
        for n in range(1, len(tree))
        for _ in tree.steps[n].token_ids
    )
    pairs = seen + len(tree.prompt) ** 2 / 2
    embedding = model.get_output_embeddings().weight.numel()  # tied: the head's work, once a target
    layers = sum(w.numel() for w in model.parameters()) - embedding
    linear = layers * packed_tokens(tree) + embedding * tree.unique_tokens
    return 6 * linear + 12 * heads * pairs


def graphs() -> int:
    """Graphs compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def attention_times(tree: Tree, config: LearnerConfig) -> tuple[float, float]:
    """Forward and backward of one layer's attention [s]: FlexAttention over the packed tree, and
    flash attention over its trajectories, all as long as the longest."""
    packed_tree = tree_pack(tree, config).to(DEVICE)
    flex = FlexTreeAttention(packed_tree.last)
    rows, length = len(tree.end_nodes()), PROMPT + TOKENS

    def states(*shape: int) -> list[torch.Tensor]:
        return [
            torch.randn(
                shape[0], heads, shape[1], 128, device=DEVICE, dtype=torch.bfloat16,
                requires_grad=True,
            )
            for heads in (16, 8, 8)
        ]  # fmt: skip

    packed, rowwise = states(1, len(packed_tree.ids)), states(rows, length)

    def run_flex() -> None:
        flex.attend(*packed, 128**-0.5).sum().backward()

    def run_flash() -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = scaled_dot_product_attention(*rowwise, is_causal=True, enable_gqa=True)
        out.sum().backward()

    return median_seconds(run_flex), median_seconds(run_flash)


def tree_pack(tree: Tree, config: LearnerConfig) -> Pack:
    (training_tree,) = training_trees([tree], config)
    tree_drafts = drafts(tree, training_tree.weight_N, config)
    unpadded = pack([Piece(draft, training_tree) for draft in tree_drafts])
    return padded(unpadded, -(-len(unpadded.ids) // 128) * 128)


def median_seconds(work: Callable[[], object]) -> float:
    for _ in range(3):
        work()
    return statistics.median(seconds(work) for _ in range(10))


def on_cuda() -> dict[str, float]:
    """Steps on a (4, 9, 1, 1) tree each, packed and trajectory by trajectory, in turn."""
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: no GPU here")
    config = LearnerConfig(
        model=Path("none"),
        prompts="none",
        kl_weight=0.0,
        temperature=1.0,
        lr=1e-9,
        skip_uniform_trees=False,  # a single trajectory is uniform
        micro_batch_tokens=18432,
    )
    rng, rate = random.Random(0), matmul_rate()
    shape = {"prompt": PROMPT, "tokens": TOKENS, "vocabulary": 151936}
    trees = [synthetic_tree(rng, **shape) for _ in range(WARM_STEPS + STEPS)]
    flex_s, flash_s = attention_times(trees[0], config)
    model = model_of_1_7b()
    packed = Trainer(model, None, config, DEVICE)
    rows = Trainer(copy.deepcopy(model), None, config, DEVICE)
    times: dict[str, list[float]] = {"packed": [], "rows": []}
    peaks: dict[str, list[int]] = {"packed": [], "rows": []}
    compiled = 0
    for i, tree in enumerate(trees):
        if i == WARM_STEPS:
            compiled = graphs()
        work = {"packed": (packed, [tree]), "rows": (rows, single_trajectories(tree))}
        for name, (trainer, batch) in work.items():
            trainer.optimizer.zero_grad(set_to_none=True)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            times[name].append(seconds(lambda t=trainer, b=batch: t.step(b, version=0)))
            peaks[name].append(torch.cuda.max_memory_allocated() - before)
    ratios = [r / p for r, p in zip(times["rows"], times["packed"], strict=True)][WARM_STEPS:]
    used = [step_flops(model, tree) / s for tree, s in zip(trees, times["packed"], strict=True)]
    return {
        "speedup": statistics.median(ratios),
        "speedup_limit": statistics.median(flat_tokens(t) / packed_tokens(t) for t in trees),
        "packed_s": statistics.median(times["packed"][WARM_STEPS:]),
        "rows_s": statistics.median(times["rows"][WARM_STEPS:]),
        "packed_peak_gib": max(peaks["packed"][WARM_STEPS:]) / 2**30,
        "rows_peak_gib": max(peaks["rows"][WARM_STEPS:]) / 2**30,
        "matmul_tflops": rate / 1e12,
        "model_flop_utilisation": statistics.median(used[WARM_STEPS:]) / rate,
        "recompilations_after_5_steps": float(graphs() - compiled),
        "flex_attention_ms": flex_s * 1e3,
        "flash_attention_rows_ms": flash_s * 1e3,
    }
