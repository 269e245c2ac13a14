"""Which trees a stop gives its grace to: those nearest to their end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Key = TypeVar("Key")


def kept(left_s: Mapping[Key, float | None], grace_s: float, beside: int = 0) -> list[Key]:
    """The trees that stay, nearest to their end first; what the others take of the engine is
    theirs from now on.

    `left_s`: how long each tree still needs at its pace so far [s], None if it has none yet.
    `beside`: trees that stay in any case. Of n trees that share the engine k remain, so that each
    needs about k / n of its time: as many stay as end within `grace_s` then. Those without a pace
    come last: they stay if all others do.
    """
    known = [(left, key) for key, left in left_s.items() if left is not None]
    known.sort(key=lambda one: one[0])
    everyone = len(left_s) + beside
    stay = 0
    for place, (left, _) in enumerate(known, 1):
        if left * (place + beside) / everyone <= grace_s:
            stay = place
    names = [key for _, key in known[:stay]]
    if stay == len(known):
        names += [key for key, left in left_s.items() if left is None]
    return names
