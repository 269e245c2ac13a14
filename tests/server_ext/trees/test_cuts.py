"""Steps of generated ids, against a search in the raw bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server_ext.trees.cuts import Segmenter

EOS = 0
VOCABULARY = [b"<eos>", b"a", b"b", b" ", b".", b"\n", b"\n\n", b"\n\n\n", b".\n\n", b"\na", b"a\n"]
VOCABULARY += [b"\xc3", b"\xa9", b"\xe3\x80", b"\x82", b"\x82\n", b"\xe3\x80\x82\n\n", b"\xff"]
ID = {piece: i for i, piece in enumerate(VOCABULARY)}
IDS = st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=30)
SEPARATORS = ["\n\n", "\n", ".\n\n", "a\n", "é", "。", "ab", "<eos>"]


def decode(token_ids) -> str:
    return b"".join(VOCABULARY[i] for i in token_ids).decode(errors="replace")


def closers(separator: str) -> set[int] | None:
    """Closers as server_ext.trees.text.Tokenizer works them out."""
    last = separator[-1]
    return {i for i in range(len(VOCABULARY)) if last in decode([i])} if last.isascii() else None


def segmenter(separator: str = "\n\n") -> Segmenter:
    return Segmenter(decode, separator, closers(separator))


def slow_lengths(token_ids: list[int], separator: str) -> list[int]:
    """Finds the first separator in the bytes after the last close; no text is decoded."""
    lengths = []
    while token_ids:
        pieces = [VOCABULARY[i] for i in token_ids]
        at = b"".join(pieces).find(separator.encode())
        last_byte = at + len(separator.encode())
        length = len(pieces)
        if at >= 0:
            length = next(
                n for n in range(len(pieces) + 1) if sum(map(len, pieces[:n])) >= last_byte
            )
        lengths.append(length)
        token_ids = token_ids[length:]
    return lengths


@given(IDS, st.sampled_from(SEPARATORS))
def test_as_a_search_in_the_bytes(token_ids, separator):
    assert segmenter(separator).lengths(token_ids) == slow_lengths(token_ids, separator)


@given(IDS, st.sampled_from(SEPARATORS))
def test_steps_concatenate_to_the_exact_ids(token_ids, separator):
    lengths = segmenter(separator).lengths(token_ids)
    assert sum(lengths) == len(token_ids)
    assert all(length >= 1 for length in lengths)


@given(IDS, st.sampled_from(SEPARATORS))
def test_closers_change_nothing(token_ids, separator):
    every = Segmenter(decode, separator, None).lengths(token_ids)
    assert segmenter(separator).lengths(token_ids) == every


@given(IDS, IDS)
def test_more_tokens_change_no_closed_step(token_ids, more):
    """A branch from the end of a step is cut as the whole trajectory is."""
    lengths = segmenter().lengths(token_ids)
    closed = lengths if slow_closed(token_ids) else lengths[:-1]
    assert segmenter().lengths(token_ids + more)[: len(closed)] == closed


@given(IDS, IDS)
def test_the_search_starts_afresh_after_each_close(head, tail):
    lengths = segmenter().lengths(head)
    if slow_closed(head):
        assert segmenter().lengths(head + tail) == lengths + segmenter().lengths(tail)


def slow_closed(token_ids: list[int]) -> bool:
    last = slow_lengths(token_ids, "\n\n")[-1:]
    return bool(last) and "\n\n" in decode(token_ids[-last[0] :])


def cut(*pieces: bytes, separator: str = "\n\n") -> list[str]:
    token_ids, at, texts = [ID[p] for p in pieces], 0, []
    for length in segmenter(separator).lengths(token_ids):
        texts.append(decode(token_ids[at : at + length]))
        at += length
    return texts


@pytest.mark.parametrize(
    ("pieces", "texts"),
    [
        ([], []),
        ([b"a"], ["a"]),
        ([b"a", b"\n", b"b"], ["a\nb"]),
        ([b"a", b".\n\n", b"b"], ["a.\n\n", "b"]),
        ([b"a", b"\n", b"\n", b"b"], ["a\n\n", "b"]),  # spans tokens
        ([b"a\n", b"\na", b"b"], ["a\n\na", "b"]),  # completed inside a token
        ([b"a", b"\n\n\n", b"b"], ["a\n\n\n", "b"]),
        ([b"a", b"\n\n\n", b"\n", b"b"], ["a\n\n\n", "\nb"]),  # afresh: the fourth one is alone
        ([b"\n\n", b"\n", b"\n"], ["\n\n", "\n\n"]),
        ([b"\n\n", b"\n\n"], ["\n\n", "\n\n"]),
        ([b"a", b"\n\n", b"<eos>"], ["a\n\n", "<eos>"]),  # the end of sequence is the last step
        ([b"a", b"\n", b"<eos>"], ["a\n<eos>"]),
        ([b"a", b"\n\n"], ["a\n\n"]),  # nothing after: no empty step
        ([b"\xc3", b"\n\n", b"\xa9"], ["\ufffd\n\n", "\ufffd"]),  # a character cut by a step
        ([b"\xe3\x80", b"\x82\n", b"\n", b"a"], ["。\n\n", "a"]),
        ([b"\xe3\x80\x82\n\n", b"a"], ["。\n\n", "a"]),
        ([b"\xff", b"\n", b"\xff", b"\n"], ["\ufffd\n\ufffd\n"]),
    ],
)
def test_by_hand(pieces, texts):
    assert cut(*pieces) == texts


def test_a_separator_spread_over_the_bytes_of_a_character():
    assert cut(b"\xe3\x80", b"\x82", b"a", separator="。") == ["。", "a"]
    assert cut(b"a", b"\xc3", b"\xa9", b"\xa9", separator="é") == ["aé", "\ufffd"]


def test_only_closers_are_decoded_and_only_since_the_last_close():
    decoded = []

    def spy(token_ids):
        decoded.append(list(token_ids))
        return decode(token_ids)

    token_ids = [ID[p] for p in (b"a", b"b", b".\n\n", b"a", b"\n", b"b", b"<eos>")]
    Segmenter(spy, "\n\n", closers("\n\n")).lengths(token_ids)
    assert decoded == [token_ids[:3], token_ids[3:5]]


def test_tuples_and_lists_alike():
    token_ids = [ID[b"a"], ID[b"\n\n"], ID[b"b"]]
    assert segmenter().lengths(tuple(token_ids)) == segmenter().lengths(token_ids) == [2, 1]
