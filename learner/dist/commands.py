"""What rank 0 tells the other ranks, and how: JSON and serialized trees, nothing that runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ibtree.tree import Tree
from ibtree.wire.trees import tree_from_bytes, tree_to_bytes


@dataclass(frozen=True)
class Command:
    """What all ranks are to do: its name, its trees, and what else it needs."""

    name: str
    facts: dict[str, Any]
    trees: list[Tree]

    def parts(self) -> list[bytes]:
        """Name and facts in JSON, then each tree, all as bytes."""
        head = json.dumps({"name": self.name, "facts": self.facts})
        return [head.encode(), *map(tree_to_bytes, self.trees)]

    @staticmethod
    def of(parts: Sequence[bytes]) -> Command:
        return Command(**json.loads(parts[0]), trees=[tree_from_bytes(part) for part in parts[1:]])


def send(parts: Sequence[bytes]) -> None:
    """Sends from rank 0 to all others; tensors on the CPU travel by gloo."""
    dist.broadcast(torch.tensor([len(parts)]), src=0)
    if parts:
        dist.broadcast(torch.tensor([len(part) for part in parts]), src=0)
        dist.broadcast(torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8), src=0)


def receive() -> list[bytes]:
    """What rank 0 sends."""
    count = torch.zeros(1, dtype=torch.int64)
    dist.broadcast(count, src=0)
    if not count:
        return []
    lengths = torch.zeros(int(count), dtype=torch.int64)
    dist.broadcast(lengths, src=0)
    blob = torch.zeros(int(lengths.sum()), dtype=torch.uint8)
    dist.broadcast(blob, src=0)
    return [part.numpy().tobytes() for part in torch.split(blob, lengths.tolist())]
