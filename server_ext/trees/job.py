"""A checked prompt."""

from __future__ import annotations

from dataclasses import dataclass

from ibtree.tree import TreeOptions
from server_ext.capacity.shares import Kind


@dataclass(frozen=True)
class Job:
    """A checked prompt: everything needed to grow its tree."""

    tree_id: str
    token_ids: tuple[int, ...]
    answer: str
    grader: str
    options: TreeOptions
    include_text: bool = False
    """Whether its expansions carry their text."""
    kind: Kind = Kind.QUEUED
    """Where it comes from: whose share of the engine it takes."""
    until: float | None = None
    """When its deadline is, on the monotonic clock. None: its options' `deadline_s`, if there is
    one, runs from the beginning of its growth on."""
