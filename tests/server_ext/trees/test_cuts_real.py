"""Cuts with the tokenizers of large models: as decoding everything, and quick at full length."""

from __future__ import annotations

import random
import time

import pytest

from server_ext.engine import cpu
from server_ext.trees.cuts import Segmenter, SentenceSegmenter, stop_length
from server_ext.trees.text import Tokenizer
from tests.data import data

SEQUENCES = 10_000
LONG = 16_384


@pytest.fixture(scope="module", params=["qwen3", "deepseek_v3", "gptoss"])
def tokenizer(request) -> Tokenizer:
    cpu.select()
    return Tokenizer(data(f"tokenizers/{request.param}"))


def likely(tokenizer: Tokenizer) -> list[int]:
    """Ids around line breaks, full stops and characters of several bytes."""
    breaks = ("a\n\nb", ".\n\n", "\n\n\n", " \n\n", "\r\n\r\n", "\n", "。\n")
    texts = (*breaks, "é", "😀\n", "a. B", ' "So?" ')
    return [token for text in texts for token in tokenizer.encode(text)]


@pytest.mark.parametrize("separators", [("\n\n",), ("\n",), ("\n\n", "。"), (". ",)])
def test_windows_cut_as_the_whole_text_does(tokenizer, separators):
    quick = tokenizer.segmenter(separators)
    slow = Segmenter(tokenizer.decode, separators, None)
    rng, ids = random.Random(0), likely(tokenizer)
    count = SEQUENCES if separators == ("\n\n",) else 500
    for _ in range(count):
        token_ids = [
            rng.choice(ids) if rng.random() < 0.8 else rng.randrange(tokenizer.model_vocabulary)
            for _ in range(rng.randrange(24))
        ]
        assert quick.lengths(token_ids) == slow.lengths(token_ids), token_ids


def test_sentences_too(tokenizer):
    quick = tokenizer.unit_segmenters(0)["sentence"]
    slow = SentenceSegmenter(tokenizer.decode)
    rng, ids = random.Random(1), likely(tokenizer)
    for _ in range(1000):
        token_ids = [rng.choice(ids) for _ in range(rng.randrange(24))]
        assert quick.lengths(token_ids) == slow.lengths(token_ids), token_ids


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
