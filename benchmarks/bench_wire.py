"""`make bench-wire`: bytes of a tree on the wire, against its trajectories sent one by one."""

from __future__ import annotations

import json
import random
import statistics
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ibtree.tree import Finish, Step, Tree
from ibtree.tree.options import TreeOptions
from ibtree.tree.score import best, candidates, ib_scores
from ibtree.wire.trees import tree_from_proto, tree_to_proto
from ibtree.wire.v1 import tree_pb2

OUT = Path(__file__).parent / "out" / "wire.json"


def grown(steps: int, tokens: int, vocabulary: int, rng: random.Random) -> Tree:
    """A (4, 9, 1, 1) tree whose rollouts have `steps` steps of about `tokens` tokens each."""
    tree = Tree(tuple(rng.randrange(vocabulary) for _ in range(20)), options=TreeOptions())
    for i in range(tree.options.trajectories):
        start = 0 if i < 4 else best(tree, ib_scores(tree), candidates(tree), 1)[0]
        new = []
        for _ in range(steps - tree.depth_steps(start)):
            n = max(1, round(rng.gauss(tokens, tokens / 4)))
            ids = tuple(rng.randrange(vocabulary) for _ in range(n))
            new.append(Step(ids, tuple(-rng.random() for _ in range(n)), (3,) * n))
        tree.insert(start, new, float(rng.random() < 0.5), Finish.STOP)
    return tree


def flat_bytes(tree: Tree) -> int:
    """The same trajectories as a list: ids and log-probabilities of every one, prompt included."""
    total = 0
    for end in tree.end_nodes():
        path = [tree.steps[n] for n in tree.path(end)]
        message = tree_pb2.Tree(
            prompt_token_ids=tree.prompt,
            token_ids=[t for s in path for t in s.token_ids],
            logprobs=[lp for s in path for lp in s.logprobs],
        )
        total += message.ByteSize() * tree.ends[end]
    return total


def main() -> None:
    rng, figures = random.Random(0), {}
    table = Table(title="a (4, 9, 1, 1) tree on the wire, median of 20")
    for column in ("", "bytes / unique token", "/ flat trajectories", "encode + decode, ms"):
        table.add_column(column, justify="right")
    for name, shape in {"arith": (6, 7, 60), "large": (16, 64, 151_000)}.items():
        sizes, ratios, times = [], [], []
        for _ in range(20):
            tree = grown(*shape, rng)
            begin = time.perf_counter()
            data = tree_to_proto(tree).SerializeToString()
            tree_from_proto(tree_pb2.Tree.FromString(data))
            times.append((time.perf_counter() - begin) * 1e3)
            sizes.append(len(data) / tree.unique_tokens)
            ratios.append(len(data) / flat_bytes(tree))
        row = [statistics.median(values) for values in (sizes, ratios, times)]
        table.add_row(name, *(f"{value:.2f}" for value in row))
        for key, value in zip(("bytes_per_token", "flat_ratio", "codec_ms"), row, strict=True):
            figures[f"{key}_{name}"] = value
    Console().print(table)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
