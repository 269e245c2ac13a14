"""The tokenizer of a model folder and its segmenter, for byte-level and metaspace models."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from ibtree.errors import FieldError
from ibtree.messages import Chat, ChatMessage
from server_ext.trees.cuts import Segmenter
from server_ext.trees.text import Tokenizer as ModelTokenizer
from tests.data import data

PIECES = [".\n\n", "\n\n", "\n\n\n", "a\n", "\na", "ab", ". ", " a", "é", "。\n\n", "\r\n\r\n"]


def byte_level() -> Tokenizer:
    """Every byte, and PIECES by merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for piece in PIECES:
        left, *letters = spelling.pre_tokenize_str(piece)[0][0]
        for right in letters:
            if left + right not in vocabulary:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
            left += right
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = spelling
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<eos>", special=True)])
    return made


def metaspace() -> Tokenizer:
    """Like SentencePiece models: a word begins with its space, bytes as a fallback."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁a", "a", "b", ".", ".\n\n"]
    pieces += ["\n", "\n\n", "▁\n"]
    made = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [("▁", "a"), ("\n", "\n"), (".", "\n\n"), ("▁", "\n")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens([AddedToken("<eos>", special=True)])
    return made


def saved(folder: Path, made: Tokenizer) -> Path:
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}'
    )
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module", params=[byte_level, metaspace])
def tokenizer(request, tmp_path_factory) -> ModelTokenizer:
    return ModelTokenizer(saved(tmp_path_factory.mktemp("model"), request.param()))


def test_text_there_and_back(tokenizer):
    for text in ("a b.\n\na\nb", "é", "。\n\na"):
        token_ids = tokenizer.encode(text)
        assert tokenizer.decode(token_ids) == text
        assert all(0 <= token < len(tokenizer) for token in token_ids)


def test_special_tokens_are_kept_or_left_out(tokenizer):
    eos = len(tokenizer) - 1
    token_ids = (*tokenizer.encode("a."), eos)
    assert tokenizer.decode(token_ids) == "a.<eos>"
    assert tokenizer.decode(token_ids, special=False) == "a."


@pytest.mark.parametrize("separator", ["\n\n", "\n", ".\n\n", "a\n", ". ", "é", "。\n\n"])
def test_closers_miss_no_step(tokenizer, separator):
    """The segmenter with closers, against one that tries every token."""
    quick = tokenizer.segmenter(separator)
    every = Segmenter(tokenizer.decode, separator, None)
    rng = random.Random(0)
    likely = [t for text in (*PIECES, ". a", " ", "。") for t in tokenizer.encode(text)]
    for _ in range(300):
        token_ids = [
            rng.choice(likely) if rng.random() < 0.9 else rng.randrange(len(tokenizer))
            for _ in range(rng.randrange(12))
        ]
        assert quick.lengths(token_ids) == every.lengths(token_ids), token_ids


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FieldError) as caught:
        ModelTokenizer(tmp_path)
    assert caught.value.field == "model"


def test_a_separator_the_tokenizer_cannot_make_is_refused(tmp_path):
    made = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(FieldError, match="cannot make") as caught:
        ModelTokenizer(saved(tmp_path, made)).segmenter("\n\n")
    assert caught.value.field == "separator"


TEMPLATE = (
    "{% for turn in messages %}{% if turn.role == 'judge' %}{{ raise_exception('no judges') }}"
    "{% endif %}[{{ turn.role }}]{{ turn.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_chat_goes_through_the_models_template(tmp_path):
    tokenizer = ModelTokenizer(saved(tmp_path, byte_level()))
    chat = Chat((ChatMessage("system", "Sum."), ChatMessage("user", "1+1?\n\n")))
    with pytest.raises(FieldError, match=r"prompt\.chat: the model has no chat template"):
        tokenizer.encode_chat(chat)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = ModelTokenizer(tmp_path)
    token_ids = tokenizer.encode_chat(chat)
    expected = "[system]Sum.<eos>[user]1+1?\n\n<eos>[assistant]"
    assert tokenizer.decode(token_ids) == expected
    assert token_ids.count(tokenizer.encode("<eos>")[0]) == 2, "special tokens, not their letters"
    with pytest.raises(FieldError, match=r"prompt\.chat: rejected .* no judges"):
        tokenizer.encode_chat(Chat((ChatMessage("judge", "x"),)))


def with_bos(folder: Path, made: Tokenizer, bos: str) -> ModelTokenizer:
    """Like Llama's: the tokenizer puts the BOS in front of a text, and the template writes it."""
    made.add_special_tokens([AddedToken(bos, special=True)])
    front = [(bos, made.token_to_id(bos))]
    made.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=front)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos}
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + TEMPLATE)
    return ModelTokenizer(folder)


CHAT = Chat((ChatMessage("user", "ab"),))


def check_one_bos(tokenizer: ModelTokenizer, bos: str) -> None:
    """However the prompt comes, it has one BOS in front; those that follow are its own."""
    (bos_id,) = tokenizer.encode(bos)
    plain = tokenizer.encode("ab")
    assert plain[0] == bos_id and plain.count(bos_id) == 1
    for text in (bos + "ab", bos + "ab" + bos, bos + bos + "ab"):
        spelt = tokenizer._tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text) == tuple(spelt), text
        assert spelt.count(bos_id) == text.count(bos)
    chat = tokenizer.encode_chat(CHAT)
    assert chat[0] == bos_id and chat.count(bos_id) == 1
    assert tokenizer.encode(tokenizer.decode(chat)) == chat, "rendered elsewhere, sent as text"


@pytest.mark.parametrize("kind", [byte_level, metaspace])
def test_there_is_one_bos(tmp_path, kind):
    check_one_bos(with_bos(tmp_path, kind(), "<s>"), "<s>")


def test_there_is_one_bos_in_front_of_a_real_models_prompt(tmp_path):
    """DeepSeek's vocabulary and BOS, put in front as its reference code does."""
    folder, bos = data("tokenizers/deepseek_v3"), "<｜begin▁of▁sentence｜>"
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    check_one_bos(with_bos(tmp_path, made, bos), bos)


@pytest.mark.parametrize("name", ["deepseek_v3", "gptoss", "qwen3"])
def test_a_tokenizer_that_adds_nothing_leaves_a_text_as_it_is(name):
    tokenizer = ModelTokenizer(data(f"tokenizers/{name}"))
    bos = tokenizer._tokenizer.bos_token or ""
    ids = tokenizer.encode(bos + "Is it 7?")
    assert tokenizer.decode(ids) == bos + "Is it 7?"
    assert tokenizer.encode(bos * 2 + "7")[:2] == (ids[0],) * 2 or not bos
    if tokenizer._tokenizer.chat_template:
        chat = tokenizer.encode_chat(CHAT)
        assert tokenizer.encode(tokenizer.decode(chat)) == chat
        assert not bos or chat.count(ids[0]) == 1


def test_without_a_bos_a_text_that_repeats_itself_stays():
    """Only a BOS counts: the first two ids of a text may be alike."""
    tokenizer = ModelTokenizer(data("tokenizers/qwen3"))
    assert tokenizer.decode(tokenizer.encode("\x00\x00\x00")) == "\x00\x00\x00"
