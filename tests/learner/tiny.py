"""Small models, configurations and trees for the learner's tests, on one CPU thread."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ibtree.tree import Finish, Step, Tree
from ibtree.tree.options import TreeOptions
from learner.config import LearnerConfig
from learner.train.model import mend_torchvision
from learner.tree.rows import Row, tree_rows
from learner.tree.training import training_trees
from tests.ibtree.tree.growing import Pair, find, step_of
from tests.reference import slow_loss
from tests.reference.slow_loss import Policy, Setting, Tokens

mend_torchvision()  # before anything imports transformers
torch.set_num_threads(1)

CPU = torch.device("cpu")
_SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


def config(**changes: Any) -> LearnerConfig:
    return LearnerConfig(model="model", prompts="prompts.jsonl", **changes)


def rows_of(trees: Sequence[Tree], config: LearnerConfig) -> list[Row]:
    """The rows of a batch of trees, in their order."""
    return [row for tree in training_trees(trees, config) for row in tree_rows(tree, config)]


def settings_of(config: LearnerConfig, zero_value_ratio: float = 0.0) -> Setting:
    """The reference's options with the values of `config`."""
    common = set(Setting.__dataclass_fields__) & set(LearnerConfig.model_fields)
    return Setting(
        zero_value_ratio=zero_value_ratio, **{name: getattr(config, name) for name in common}
    )


def causal_lm(kind: str = "Qwen2", *, seed: int = 0, tied: bool = True, **changes: Any) -> Any:
    """A random model whose distributions are far from flat (as initialised they hardly differ)."""
    import transformers

    torch.manual_seed(seed)
    settings = {**_SHAPE, **changes}
    shape = getattr(transformers, f"{kind}Config")(**settings, tie_word_embeddings=tied)
    model = getattr(transformers, f"{kind}ForCausalLM")(shape).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8.0 if weight.dim() > 1 else 1.0)
    return model


def in_float64(model: Any) -> Any:
    """The model in float64 throughout; its own norms compute in float32, torch's do not."""
    model = model.double()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(module.weight.shape, module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


class Bigram(nn.Module):
    """A policy whose logits depend on the token before only: easy to redo by hand."""

    def __init__(self, vocab: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(vocab, vocab, generator=generator))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


def bigram_policy(table: list[list[float]], temperature: float) -> Policy:
    """The same policy in plain Python."""

    def logp(prompt: Tokens, sofar: Tokens) -> float:
        before = (*prompt, *sofar)[-2]
        scaled = [x / temperature for x in table[before]]
        return scaled[sofar[-1]] - math.log(math.fsum(math.exp(x) for x in scaled))

    return logp


def random_pair(rng: random.Random, *, levels: int, zero_value_ratio: float = 0.0) -> Pair:
    """A random tree, fast and slow. `levels` 2, 3 or 5 keep sums of rewards exact."""
    pair = Pair(levels, options=TreeOptions(zero_value_ratio=zero_value_ratio))
    plan = []
    for _ in range(rng.randint(2, 8)):
        steps = [
            tuple(rng.randrange(3) for _ in range(rng.randint(1, 4)))
            for _ in range(rng.randint(1, 4))
        ]
        plan.append((rng.choice([0, rng.randrange(100)]), steps))
    return pair.grow(plan)


def mixed_batch(rng: random.Random, zero_value_ratio: float = 0.0) -> list[Pair]:
    """Two random trees with reward variance and one without, twins among its rollouts."""
    pairs: list[Pair] = []
    while len(pairs) < 2:
        pair = random_pair(rng, levels=rng.choice([2, 3, 5]), zero_value_ratio=zero_value_ratio)
        if not slow_loss.uniform(pair.slow):
            pairs.append(pair)
    alike = Pair(1, options=TreeOptions(zero_value_ratio=zero_value_ratio))
    plan = [(0, [(1, 1), (2,)]), (0, [(1, 1), (2,)]), (1, [(0,)])]
    return [pairs[0], alike.grow(plan), pairs[1]]


def wild_tree(
    rng: random.Random, *, rollouts: int, depth: int, splits: int, prompt: int = 3
) -> Tree:
    """A tree with whatever a tree can have: steps merged and drawn again, trajectories that end
    where others go on, steps split at a token, long unary chains. `depth` is in steps."""
    tree = Tree(tuple(rng.randrange(40) for _ in range(prompt)), options=TreeOptions())
    for _ in range(rollouts):
        inner = [n for n in range(len(tree)) if tree.alive(n) == n and not tree.is_leaf(n)]
        start = rng.choice([0, *inner])
        room = max(depth - tree.depth_steps(start), 1)
        steps: list[Step] = []
        at: int | None = start
        for _ in range(rng.choice((room, rng.randint(1, room)))):
            known = [] if at is None else [tree.steps[n].token_ids for n in tree.children(at)]
            new = tuple(rng.choice((0, 39)) for _ in range(rng.randint(1, 3)))
            ids = rng.choice([*known, new])
            logprobs = tuple(-rng.randrange(160) / 64 for _ in ids)
            steps.append(Step(ids, logprobs, (rng.randrange(3),) * len(ids)))
            at = None if at is None else find(tree, at, steps[-1:])
        before = tree.prefix(start) + tuple(t for step in steps for t in step.token_ids)
        tree.insert(start, steps, float(zlib.crc32(bytes(before)) % 2), Finish.STOP)
    for _ in range(splits):
        long = [n for n in range(1, len(tree)) if len(tree.steps[n].token_ids) > 1]
        if long:
            node = rng.choice(long)
            tree.split(node, rng.randrange(1, len(tree.steps[node].token_ids)))
    return tree


def flat_tree(rollouts: list[tuple[tuple[int, ...], float]], **fields: Any) -> Tree:
    """A tree of single-step trajectories from (ids, reward)."""
    tree = Tree(**{"prompt": (7, 8), **fields})
    for ids, reward in rollouts:
        tree.insert(0, [step_of(ids)], reward, Finish.STOP)
    return tree
