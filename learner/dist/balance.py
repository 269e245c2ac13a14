"""Work shared out evenly."""

from __future__ import annotations

from collections.abc import Sequence


def balanced(sizes: Sequence[int], shares: int) -> list[list[int]]:
    """Indices in `shares` shares of about equal size, ascending in each: the largest first, each
    to the share that has least (at most 4/3 of the best possible; Graham 1969)."""
    found: list[list[int]] = [[] for _ in range(shares)]
    totals = [0] * shares
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = totals.index(min(totals))
        found[least].append(i)
        totals[least] += sizes[i]
    return [sorted(share) for share in found]
