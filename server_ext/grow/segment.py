"""Cutting generated token ids into reasoning steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from itertools import pairwise


class Segmenter:
    """A step ends with the token whose text completes the separator.

    A function of the generated ids alone: the text is decoded cumulatively from the last close,
    never re-tokenised, so the steps concatenate to the exact ids.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        separator: str,
        closers: Set[int] | None = None,
    ) -> None:
        """`closers`: ids that may complete the separator (only there the text is decoded);
        None: every id may."""
        self._decode, self._separator, self._closers = decode, separator, closers

    def lengths(self, token_ids: Sequence[int]) -> list[int]:
        """Length of each step [tokens]; they sum to len(token_ids). What follows the last
        separator, the end-of-sequence token included, is the last step."""
        ends, opened = [0], 0
        for i, token in enumerate(token_ids):
            if self._closers is not None and token not in self._closers:
                continue
            if self._separator in self._decode(token_ids[opened : i + 1]):
                opened = i + 1
                ends.append(opened)
        if ends[-1] < len(token_ids):
            ends.append(len(token_ids))
        return [b - a for a, b in pairwise(ends)]
