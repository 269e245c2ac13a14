"""A checked prompt."""

from __future__ import annotations

from dataclasses import dataclass

from ibtree.tree import TreeOptions


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
    urgent: bool = False
    """Somebody waits for it: its rollouts go before those of queued prompts."""
