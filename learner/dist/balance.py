"""Work divided evenly."""

from __future__ import annotations

from collections.abc import Sequence


def balanced(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Indices in `count` parts of about equal size, ascending in each: the largest first, each
    to the part that has least (at most 4/3 of the best possible; Graham 1969)."""
    parts: list[list[int]] = [[] for _ in range(count)]
    totals = [0] * count
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = totals.index(min(totals))
        parts[least].append(i)
        totals[least] += sizes[i]
    return [sorted(part) for part in parts]
