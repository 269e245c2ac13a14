"""Slow and obvious cuts: each decodes all of the open step anew after every token.

Independent of server_ext.trees.cuts: no window, no list of tokens that may close, no bisection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]


def slow_lengths(
    decode: Decode, separators: Sequence[str], token_ids: Sequence[int], max_step_tokens: int = 0
) -> list[int]:
    """Length of each step [tokens]: it ends with the token whose text completes a separator."""
    lengths, opened = [], 0
    for stop in range(1, len(token_ids) + 1):
        text = decode(token_ids[opened:stop])
        closed = any(separator in text for separator in separators)
        if closed or stop - opened == max_step_tokens or stop == len(token_ids):
            lengths.append(stop - opened)
            opened = stop
    return lengths


def slow_stop_length(
    decode: Decode, before: Sequence[int], token_ids: Sequence[int], stops: Sequence[str]
) -> int | None:
    """Tokens up to the first after which a stop string is in the text of the whole path."""
    for length in range(1, len(token_ids) + 1):
        text = decode([*before, *token_ids[:length]])
        if any(stop in text for stop in stops):
            return length
    return None
