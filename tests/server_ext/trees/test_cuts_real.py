"""Cuts with the tokenizers of large models: as decoding everything, and quick at full length."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest

from server_ext.engine import cpu
from server_ext.trees.cuts import SentenceSegmenter, stop_length
from server_ext.trees.text import Tokenizer
from tests.data import data
from tests.reference.slow_cuts import slow_lengths, slow_stop_length

SEQUENCES = 10_000
LONG = 16_384


@pytest.fixture(scope="module", params=["qwen3", "deepseek_v3", "gptoss"])
def tokenizer(request) -> Tokenizer:
    cpu.select()
    return Tokenizer(data(f"tokenizers/{request.param}"))


def likely(tokenizer: Tokenizer) -> list[int]:
    """Ids around line breaks, full stops and characters of several bytes."""
    breaks = ("a\n\nb", ".\n\n", "\n\n\n", " \n\n", "\r\n\r\n", "\n", "\n ", "。\n")
    texts = (*breaks, "é", "😀\n", "a. B", ' "So?" ', " a")
    return [token for text in texts for token in tokenizer.encode(text)]


def sequences(tokenizer: Tokenizer, count: int, longest: int = 24) -> Iterator[list[int]]:
    """Line breaks, bits of characters, special tokens and ids of the model alone, each by turns
    the most of a sequence."""
    rng, common, size = random.Random(0), likely(tokenizer), tokenizer.model_vocabulary
    texts = [(i, tokenizer.decode([i])) for i in range(len(tokenizer))]
    favourites = (
        common,
        [i for i, text in texts if "\n" in text and len(text) < 4],
        [i for i, text in texts if "\ufffd" in text],
        [i for i, text in texts if text == "\ufffd"],
        range(len(tokenizer) - 200, size),
        range(size),
    )
    for _ in range(count):
        favourite = rng.choice([ids for ids in favourites if ids])
        yield [
            rng.choice(favourite) if rng.random() < 0.7 else rng.choice(common)
            for _ in range(rng.randrange(longest))
        ]


@pytest.mark.parametrize(
    "separators", [("\n\n",), ("\n",), ("\n\n", "。"), (". ",), ("é",), ("<|end", "\n\n\n")]
)
def test_windows_cut_as_the_whole_text_does(tokenizer, separators):
    quick = tokenizer.segmenter(separators)
    for token_ids in sequences(tokenizer, SEQUENCES if separators == ("\n\n",) else 1000):
        expected = slow_lengths(tokenizer.decode, separators, token_ids)
        assert quick.lengths(token_ids) == expected, token_ids


def test_stop_strings_end_where_the_whole_text_says(tokenizer):
    stops = ("\n\na", "é", ". B")
    for token_ids in sequences(tokenizer, 1000):
        before, rest = token_ids[: len(token_ids) // 3], token_ids[len(token_ids) // 3 :]
        if any(stop in tokenizer.decode(before) for stop in stops):
            continue  # such a path has ended before
        expected = slow_stop_length(tokenizer.decode, before, rest, stops)
        assert stop_length(tokenizer.decode, before, rest, stops) == expected, token_ids


@pytest.mark.parametrize("at", [0, 255, 256, 257, 700, 1000])
def test_a_stop_string_across_blocks(tokenizer, at):
    """Blocks of 256 tokens are decoded at a time; it is spelt with one token a letter here."""
    letters = [token for letter in "END" for token in tokenizer.encode(letter)]
    [word] = tokenizer.encode("word")
    token_ids = [word] * at + letters + [word] * 300
    assert stop_length(tokenizer.decode, (), token_ids, ("END",)) == at + len(letters)
    assert stop_length(tokenizer.decode, token_ids[: at + 1], token_ids[at + 1 :], ("END",)) == 2


def test_sentences_too(tokenizer):
    quick = tokenizer.unit_segmenters(0)["sentence"]
    slow = SentenceSegmenter(tokenizer.decode)
    for token_ids in sequences(tokenizer, 1000):
        assert quick.lengths(token_ids) == slow.lengths(token_ids), token_ids


def test_a_rollout_of_bits_of_characters_is_cut_quickly(tokenizer):
    """Every token may complete a separator that is no ASCII."""
    bits = [i for i in range(len(tokenizer)) if tokenizer.decode([i]) == "\ufffd"]
    token_ids = random.Random(0).choices(bits, k=LONG)
    began = time.process_time()
    tokenizer.segmenter(("。",)).lengths(token_ids)
    assert time.process_time() - began < 1.0


@pytest.mark.parametrize(
    "text", ["So 12 and 7 make 19.\n", "\n", "一二三。", "word ", "😀\n"], ids=repr
)
def test_a_rollout_of_full_length_is_cut_quickly(tokenizer, text):
    """Quadratic, it took 7.5 s and more. A bound far above what it takes, and far below that."""
    piece = tokenizer.encode(text)
    token_ids = (piece * (LONG // len(piece) + 1))[:LONG]
    segmenters = [tokenizer.segmenter(("\n\n",)), *tokenizer.unit_segmenters(0).values()]
    for segmenter in segmenters:
        began = time.process_time()
        assert sum(segmenter.lengths(token_ids)) == LONG
        assert time.process_time() - began < 1.0


def test_a_stop_string_at_the_end_of_a_long_rollout_is_found_quickly(tokenizer):
    token_ids = (tokenizer.encode("word ") * LONG)[:LONG] + tokenizer.encode("END")
    began = time.process_time()
    assert stop_length(tokenizer.decode, (), token_ids, ("END",)) is not None
    assert time.process_time() - began < 1.0


def test_texts_are_tokenised_as_the_file_says(tokenizer):
    """transformers rebuilds a file that names Llama's class, and then loses line breaks."""
    text = "Let x = 2.\n\nSo  x² = 4, 二。\n"
    assert tokenizer.decode(tokenizer.encode(text), special=False) == text


def test_ids_that_only_the_model_has_decode_to_nothing(tmp_path, tokenizer):
    assert tokenizer.decode([len(tokenizer) + 7]) == ""
