"""Where generated token ids are cut: into reasoning steps, and where a stop string ends them.

Cuts are a function of the generated ids alone: text is decoded, never tokenised again, so the
steps concatenate to the exact ids. Only a window of the last few tokens is decoded at a time.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median

Decode = Callable[[Sequence[int]], str]

_TOKENS_A_CHARACTER = 4
"""At most: the bytes of one."""
_BLOCK_TOKENS = 256
"""What is decoded at once in the search for a stop string."""
UNITS: dict[str, tuple[str, ...]] = {"paragraph": ("\n\n",), "line": ("\n",), "sentence": ()}
"""What closes a step under the rule `auto`, the coarsest first."""
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*\s+\Z|[。！？][\"'”’)\]」』]*\Z")
_PERHAPS_END = re.compile(r"[.!?…][\"'”’)\]]*\Z")
_ENDING = "..!?…。！？\"'”’)]」』"


@dataclass(frozen=True)
class Vocabulary:
    """What single tokens look like, for deciding how far back a window must reach."""

    silent: Set[int]
    """Ids that decode to nothing by themselves."""
    partial: Set[int]
    """Ids that hold a part of a character, or a byte that is decoded together with its
    neighbours."""
    longest_run: int = _TOKENS_A_CHARACTER
    """How many partial ids in a row are decoded together, at most. Where bytes are bytes, those of
    a character."""


class Segmenter:
    """Closes a step after the token whose text completes a separator, or at a length.

    The search starts afresh after each close.
    """

    def __init__(
        self,
        decode: Decode,
        separators: str | Sequence[str],
        closers: Set[int] | None = None,
        vocabulary: Vocabulary | None = None,
        max_step_tokens: int = 0,
    ) -> None:
        """`closers`: ids that may complete a separator (only there text is decoded); None: every id
        may. `vocabulary`: None decodes all of the open step each time, which is slow and obvious.
        """
        self._decode, self._closers, self._vocabulary = decode, closers, vocabulary
        self._separators = (separators,) if isinstance(separators, str) else tuple(separators)
        self._max_step_tokens = max_step_tokens
        self._reach = 2 + _TOKENS_A_CHARACTER * max(map(len, self._separators), default=1)

    def lengths(self, token_ids: Sequence[int]) -> list[int]:
        """Length of each step [tokens]; they sum to len(token_ids). What follows the last close,
        the end-of-sequence token included, is the last step."""
        ends, opened = [0], 0
        for i, token in enumerate(token_ids):
            full = i + 1 - opened == self._max_step_tokens
            may_close = self._closers is None or token in self._closers
            if full or (may_close and self._closes(token_ids, opened, i)):
                opened = i + 1
                ends.append(opened)
        if ends[-1] < len(token_ids):
            ends.append(len(token_ids))
        return [b - a for a, b in pairwise(ends)]

    def _closes(self, token_ids: Sequence[int], opened: int, i: int) -> bool:
        text = self._tail(token_ids, opened, i + 1)
        return any(separator in text for separator in self._separators)

    def _tail(self, token_ids: Sequence[int], opened: int, stop: int) -> str:
        """The end of the open step's text, with all that a separator could reach back to."""
        start, counted = opened, 0
        if self._vocabulary is not None:
            start = stop
            while start > opened and counted < self._reach:
                start -= 1
                counted += token_ids[start] not in self._vocabulary.silent
            least = max(start - self._vocabulary.longest_run, opened)
            while start > least and token_ids[start] in self._vocabulary.partial:
                start -= 1
        return self._decode(token_ids[start:stop])


class SentenceSegmenter(Segmenter):
    """Closes a step after a sentence: after its full stop (or mark, and quotes) where white space
    follows, in the same token or in the next; after a CJK full stop at once."""

    def __init__(
        self,
        decode: Decode,
        closers: Set[int] | None = None,
        vocabulary: Vocabulary | None = None,
        max_step_tokens: int = 0,
    ) -> None:
        super().__init__(decode, ".", closers, vocabulary, max_step_tokens)

    def _closes(self, token_ids: Sequence[int], opened: int, i: int) -> bool:
        text = self._tail(token_ids, opened, i + 1)
        if _SENTENCE_END.search(text):
            return True
        if not _PERHAPS_END.search(text) or i + 1 == len(token_ids):
            return False
        longer = self._tail(token_ids, opened, i + 2)
        at = longer.rfind(text[-1])
        return longer[at + 1 : at + 2].isspace()


def sentence_closers(texts: Sequence[str]) -> set[int]:
    """Ids after which a sentence may end, by what they look like alone."""
    return {i for i, text in enumerate(texts) if text.rstrip()[-1:] in _ENDING or text.isspace()}


def choose_unit(segmenters: dict[str, Segmenter], rollouts: Sequence[Sequence[int]]) -> str:
    """The coarsest of UNITS by which the rollouts have a median of more than one step; sentences if
    none does. `segmenters` by unit."""
    for unit in ("paragraph", "line"):
        counts = [len(segmenters[unit].lengths(token_ids)) for token_ids in rollouts]
        if counts and median(counts) > 1:
            return unit
    return "sentence"


def stop_length(
    decode: Decode,
    before: Sequence[int],
    token_ids: Sequence[int],
    stops: Sequence[str],
) -> int | None:
    """Tokens up to the one that completes the first stop string, None if there is none.

    `before`: what the path generated up to where `token_ids` begin. A stop string may lie across
    that border, where the engine, which looks at one request's output, does not see it; nor does
    it see one that is spelt with more tokens than its usual spelling has.
    """
    if not stops:
        return None
    reach = 2 + _TOKENS_A_CHARACTER * max(map(len, stops))
    border = min(len(before), reach)
    path = [*before[len(before) - border :], *token_ids]

    def stopped(begin: int, end: int) -> bool:
        text = decode(path[begin:end])
        return any(stop in text for stop in stops)

    if not stopped(0, len(path)):
        return None
    for block in range(border, len(path), _BLOCK_TOKENS):
        begin, end = max(block - reach, 0), min(block + _BLOCK_TOKENS, len(path))
        if stopped(begin, end):
            ends = range(block + 1, end + 1)
            return ends[bisect_left(ends, True, key=partial(stopped, begin))] - border
    # between its characters are more silent tokens than a block reaches back over
    ends = range(border + 1, len(path) + 1)
    return ends[bisect_left(ends, True, key=partial(stopped, 0))] - border
