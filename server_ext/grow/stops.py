"""Where a stop string ends a trajectory, to the token."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

_TOKENS_A_CHARACTER = 4
"""At most: the bytes of one."""


def stop_length(
    decode: Callable[[Sequence[int]], str],
    before: Sequence[int],
    token_ids: Sequence[int],
    stops: Sequence[str],
) -> int | None:
    """Tokens up to the one that completes the first stop string, None if there is none.

    `before`: what the path generated up to where `token_ids` begin. A stop string may lie across
    that border, where the engine, which looks at one request's output, does not see it; nor does
    it see one that is spelt with more tokens than its usual spelling has.
    """
    tail = [*before][-_TOKENS_A_CHARACTER * max(map(len, stops), default=0) :]

    def stopped(length: int) -> bool:
        text = decode([*tail, *token_ids[:length]])
        return any(stop in text for stop in stops)

    if not stops or not stopped(len(token_ids)):
        return None
    return bisect_left(range(len(token_ids) + 1), True, lo=1, key=stopped)
