"""The model's tokenizer, as the server uses it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, cached_property
from inspect import signature
from pathlib import Path
from typing import Any

from ibtree.errors import FieldError
from ibtree.messages import Chat
from server_ext.trees.cuts import (
    UNITS,
    Segmenter,
    SentenceSegmenter,
    Vocabulary,
    sentence_closers,
)

_PROBE = "a b\n\nc"
_LONGEST_RUN = 1024
"""Of byte tokens that a window may begin before: no text has more."""
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def _model_vocabulary(model: Path) -> int:
    """`vocab_size` of the folder's configuration; 0 if it does not say."""
    path = model / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 0)


def _loaded(model: Path) -> Any:
    """The folder's tokenizer. transformers rebuilds some (LlamaTokenizerFast) from their class, and
    with it DeepSeek's loses line breaks: then the file itself counts, as for SGLang."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    same = tokenizer.decode(tokenizer.encode(_PROBE, add_special_tokens=False)) == _PROBE
    if not same and (model / "tokenizer.json").is_file():
        plain = PreTrainedTokenizerFast.from_pretrained(str(model), local_files_only=True)
        if plain.decode(plain.encode(_PROBE, add_special_tokens=False)) == _PROBE:
            return plain
    return tokenizer


class Tokenizer:
    """Text <-> token ids of one model folder."""

    def __init__(self, model: Path) -> None:
        try:
            self._tokenizer = _loaded(model)
        except (OSError, ValueError, KeyError) as error:
            raise FieldError(
                "model", f"{model} has no tokenizer that loads", "a HF folder"
            ) from error
        self._size = len(self._tokenizer)  # counts anew each time, for a tenth of a second
        self.model_vocabulary = max(_model_vocabulary(model), self._size)
        """Ids the model can emit: its embedding is padded beyond the tokenizer's."""

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token, as the vocabulary spells it."""
        return max(len(token) for token in self._tokenizer.get_vocab())

    def __len__(self) -> int:
        """Number of token ids, special tokens included."""
        return self._size

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of the text, with the special tokens that the tokenizer puts around it. One that
        begins with the BOS, as chat templates write it, gets no second."""
        token_ids: tuple[int, ...] = tuple(self._tokenizer.encode(text))
        return token_ids[1:] if self._adds_bos and token_ids[1:2] == token_ids[:1] else token_ids

    @cached_property
    def _adds_bos(self) -> bool:
        """Whether the tokenizer puts a BOS in front of a text."""
        bos = self._tokenizer.bos_token_id
        return bos is not None and self._tokenizer.encode("a")[0] == bos

    def encode_chat(self, chat: Chat) -> tuple[int, ...]:
        """Ids of the model's chat template, which also opens the answer. Raises FieldError for a
        model without a template, and for what its template rejects."""
        if not self._tokenizer.chat_template:
            problem = "the model has no chat template"
            raise FieldError("prompt.chat", problem, "prompt.text or prompt.token_ids")
        turns = [asdict(turn) for turn in chat.messages]
        own = signature(self._tokenizer.apply_chat_template).parameters
        if taken := [name for name in chat.template_args if name in own]:
            problem = f"{taken[0]!r} is no argument of the model's template"
            raise FieldError("prompt.chat.template_args", problem, "names that the template reads")
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **chat.template_args
            )
        except Exception as error:  # templates are programs: they raise what they like
            raise FieldError(
                "prompt.chat", f"rejected by the model's template: {error}", "its roles, in order"
            ) from error
        # the template writes the special tokens itself
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int], *, special: bool = True) -> str:
        """Text of the ids; `special` keeps special tokens such as the end of sequence."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return text

    @cache  # noqa: B019  one tokenizer lives as long as the process
    def segmenter(self, separators: str | tuple[str, ...], max_step_tokens: int = 0) -> Segmenter:
        """Raises FieldError if the tokenizer cannot make a separator."""
        listed = (separators,) if isinstance(separators, str) else separators
        for separator in listed:
            made = self.decode(self._tokenizer.encode(separator, add_special_tokens=False))
            if separator not in made:
                raise FieldError(
                    "separator",
                    f"the model's tokenizer cannot make {separator!r} (it gives {made!r})",
                    "a text that survives encoding and decoding; set --separator",
                )
        last = {separator[-1] for separator in listed}
        # A token may complete a separator only if its own text holds the last character. Every
        # token is tried where that cannot be told: a character of several bytes can be spread
        # over tokens, and some tokenizers drop a space in front of a token that stands alone.
        told = all(character.isascii() and character != " " for character in last)
        closers = {i for i, text in enumerate(self._texts) if last & {*text}} if told else None
        return Segmenter(self.decode, listed, closers, self._vocabulary, max_step_tokens)

    @cache  # noqa: B019
    def unit_segmenters(self, max_step_tokens: int) -> dict[str, Segmenter]:
        """Segmenters of the rule `auto`, by unit. Raises FieldError as `segmenter` does."""
        made = {
            unit: self.segmenter(separators, max_step_tokens)
            for unit, separators in UNITS.items()
            if separators
        }
        closers, vocabulary = sentence_closers(self._texts), self._vocabulary
        made["sentence"] = SentenceSegmenter(self.decode, closers, vocabulary, max_step_tokens)
        return made

    @cached_property
    def _texts(self) -> list[str]:
        """What each token decodes to by itself."""
        texts: list[str] = self._tokenizer.batch_decode(
            [[i] for i in range(len(self))], clean_up_tokenization_spaces=False
        )
        return texts

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        spelt = self._tokenizer.convert_ids_to_tokens(range(len(self)))
        beyond = range(len(self), self.model_vocabulary)
        silent = {i for i, text in enumerate(self._texts) if not text} | {*beyond}
        partial = {i for i, text in enumerate(self._texts) if "\ufffd" in text}
        # one invalid byte makes all of a run of such tokens unreadable
        byte_tokens = {i for i, token in enumerate(spelt) if _BYTE_TOKEN.fullmatch(token or "")}
        if not byte_tokens:
            return Vocabulary(silent, partial)
        return Vocabulary(silent, partial | byte_tokens, _LONGEST_RUN)
