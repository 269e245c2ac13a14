"""The model's tokenizer, as the server uses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from ibtree.errors import FieldError
from ibtree.messages import Chat
from server_ext.trees.cuts import Segmenter


class Tokenizer:
    """Text <-> token ids of one model folder."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise FieldError(
                "model", f"{model} has no tokenizer that loads", "a HF folder"
            ) from error

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token, as the vocabulary spells it."""
        return max(len(token) for token in self._tokenizer.get_vocab())

    def __len__(self) -> int:
        """Number of token ids, special tokens included."""
        return len(self._tokenizer)

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text))

    def encode_chat(self, chat: Chat) -> tuple[int, ...]:
        """Ids of the model's chat template, which also opens the answer. Raises FieldError for a
        model without a template, and for what its template rejects."""
        if not self._tokenizer.chat_template:
            problem = "the model has no chat template"
            raise FieldError("prompt.chat", problem, "prompt.text or prompt.token_ids")
        turns = [asdict(turn) for turn in chat.messages]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
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

    def segmenter(self, separator: str) -> Segmenter:
        """Raises FieldError if the tokenizer cannot make the separator."""
        made = self.decode(self._tokenizer.encode(separator, add_special_tokens=False))
        if separator not in made:
            raise FieldError(
                "separator",
                f"the model's tokenizer cannot make {separator!r} (it gives {made!r})",
                "a text that survives encoding and decoding; set --separator",
            )
        last = separator[-1]
        texts = self._tokenizer.batch_decode(
            [[i] for i in range(len(self))], clean_up_tokenization_spaces=False
        )
        # A token may complete the separator only if its own text holds the last character. Every
        # token is tried where that cannot be told: a character of several bytes can be spread
        # over tokens, and some tokenizers drop a space in front of a token that stands alone.
        told = last.isascii() and last != " "
        closers = {i for i, text in enumerate(texts) if last in text} if told else None
        return Segmenter(self.decode, separator, closers)
