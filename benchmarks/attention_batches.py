"""The batches of bench_engine.py: slots of a pool of many layers, alone or as trees share them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

LAYERS, HEADS, KV_HEADS, DIM = 24, 14, 2, 64
"""Qwen2.5-0.5B."""
STEP_TOKENS = 40
"""Mean length of a reasoning step: rollouts branch at the end of one."""


@dataclass
class Batch:
    """Slot table [requests, positions], and the rows and lengths of the sequences that decode."""

    table: torch.Tensor
    rows: np.ndarray
    lengths: np.ndarray

    @property
    def tokens(self) -> int:
        """Of all sequences together."""
        return int(self.lengths.sum())

    @property
    def unique_tokens(self) -> int:
        pairs = zip(self.rows, self.lengths, strict=True)
        return len(np.unique(np.concatenate([self.table[r, :n].numpy() for r, n in pairs])))


class Pool:
    """Keys and values [slots, KV heads, dim] of every layer, bfloat16."""

    def __init__(self, slots: int) -> None:
        torch.manual_seed(0)
        shape = (slots, KV_HEADS, DIM)
        self.k = [torch.randn(shape).bfloat16() for _ in range(LAYERS)]
        self.v = [torch.randn(shape).bfloat16() for _ in range(LAYERS)]
        self.free = np.random.default_rng(0).permutation(slots - 1).astype(np.int32) + 1

    def take(self, n: int) -> np.ndarray:
        taken, self.free = self.free[:n], self.free[n:]
        return taken


def alone(pool: Pool, sequences: int, tokens: int) -> Batch:
    """Sequences that share nothing."""
    return _batch([pool.take(tokens) for _ in range(sequences)])


def trees(pool: Pool, number: int, in_flight: int, prompt: int, seed: int = 1) -> Batch:
    """The rollouts in flight of trees of (B0, L, K, B) = (4, 9, 1, 1).

    A tree has 4 rollouts from its prompt; then each of 8 rounds adds one, which branches at the end
    of a step of an earlier rollout, all steps alike likely. Steps have 10 to 70 tokens, a rollout
    ends after 256 to 1,024, all alike likely. The last `in_flight` of a tree's 12 decode.
    """
    rng = np.random.default_rng(seed)
    sequences = []
    for _ in range(number):
        start = pool.take(prompt)
        rollouts: list[tuple[np.ndarray, np.ndarray]] = []  # slots after the prompt, step ends
        for i in range(12):
            tokens = int(rng.integers(256, 1025))
            ends = np.cumsum(rng.integers(10, 2 * STEP_TOKENS - 9, tokens // 10))
            ends = ends[ends < tokens]
            if i < 4:
                rollouts.append((pool.take(tokens), ends))
                continue
            nodes = [(at, end) for at, (_, of) in enumerate(rollouts) for end in of]
            at, end = nodes[int(rng.integers(len(nodes)))]
            tokens = max(tokens, end + 1)
            slots, steps = rollouts[at]
            slots = np.concatenate([slots[:end], pool.take(tokens - end)])
            rollouts.append((slots, np.concatenate([steps[steps <= end], ends[ends > end]])))
        sequences += [np.concatenate([start, slots]) for slots, _ in rollouts[-in_flight:]]
    return _batch(sequences)


def _batch(sequences: list[np.ndarray]) -> Batch:
    lengths = np.array([len(slots) for slots in sequences])
    table = torch.zeros(len(sequences) + 1, int(lengths.max()) + 8, dtype=torch.int32)
    for row, slots in enumerate(sequences, 1):
        table[row, : len(slots)] = torch.from_numpy(slots)
    return Batch(table, np.arange(1, len(sequences) + 1), lengths)
