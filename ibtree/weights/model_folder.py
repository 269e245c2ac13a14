"""A Hugging Face model folder: the tensors it holds, and its identity."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from ibtree.errors import FieldError
from ibtree.weights.manifest import TensorSpec
from ibtree.weights.tensor_files import read_header

INDEX = "model.safetensors.index.json"
_OTHER_FORMATS = ("consolidated", "adapter_model")
"""How files begin that lie beside the weights: the same in Mistral's names, or an adapter."""
_IDENTITY_KEYS = (
    "architectures",
    "num_attention_heads",
    "num_key_value_heads",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rms_norm_eps",
    "hidden_act",
    "sliding_window",
    "tie_word_embeddings",
)


def checkpoint_specs(model_dir: Path) -> dict[str, TensorSpec]:
    """Names, dtypes and shapes of a Hugging Face folder's weights, digests left empty.

    Left out is what no model reads: tables of rotary embeddings that old files hold, and a head
    that is tied to the embeddings. Raises FieldError for a folder without whole weights.
    """
    headers = [read_header(path)[1] for path in weight_files(model_dir)]
    unread = _unread(model_dir)
    return {
        name: TensorSpec(name, entry["dtype"], tuple(entry["shape"]))
        for header in headers
        for name, entry in header.items()
        if not name.endswith(unread)
    }


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files that are the model: those of the index, if there is one; else
    model.safetensors, or the only one there.

    Raises FieldError if there are none, one is missing, or it is not clear which they are.
    """
    index = model_dir / INDEX
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
            files = [model_dir / name for name in names]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            problem = f"{index} is not an index of safetensors files ({error!r})"
            raise FieldError("model", problem, "a whole Hugging Face folder") from error
        for path in files:
            if not path.is_file():
                problem = f"{path} is missing, and {INDEX} names it"
                raise FieldError("model", problem, "a whole Hugging Face folder")
    else:
        whole = model_dir / "model.safetensors"
        files = [whole] if whole.is_file() else sorted(model_dir.glob("*.safetensors"))
        files = [path for path in files if not path.name.startswith(_OTHER_FORMATS)]
        if len(files) > 1:
            problem = f"{model_dir} holds {len(files)} *.safetensors and no {INDEX}"
            raise FieldError("model", problem, "one file, or an index of the files")
    if not files:
        raise FieldError("model", f"{model_dir} holds no *.safetensors", "a Hugging Face folder")
    return files


def stored_dtype(model_dir: Path) -> str:
    """The safetensors dtype that most of the folder's weights have. Raises FieldError."""
    sizes = Counter[str]()
    for spec in checkpoint_specs(model_dir).values():
        sizes[spec.dtype] += math.prod(spec.shape)
    return sizes.most_common(1)[0][0]


def _unread(model_dir: Path) -> tuple[str, ...]:
    """How the names of tensors end that are left out."""
    path = model_dir / "config.json"
    config = _json(path) if path.is_file() else {}
    nested = config.get("text_config") or {}
    tied = config.get("tie_word_embeddings", nested.get("tie_word_embeddings", False))
    return ("rotary_emb.inv_freq", "lm_head.weight") if tied else ("rotary_emb.inv_freq",)


def model_identity(model_dir: Path) -> str:
    """Digest of a model's tensors (names, shapes), of what its configuration says of the forward
    pass, and of its tokenizer: 64 hex characters.

    Two checkpoints of one training run have the same identity; another architecture, size or
    vocabulary has another. Raises FieldError if `model_dir` is not a Hugging Face folder.
    """
    if not (model_dir / "config.json").is_file():
        raise FieldError("model", f"{model_dir} has no config.json", "a Hugging Face model folder")
    config = _json(model_dir / "config.json")
    tokenizer = model_dir / "tokenizer.json"
    vocabulary = _json(tokenizer) if tokenizer.is_file() else {}
    total = hashlib.sha256()
    total.update(json.dumps([config.get(key) for key in _IDENTITY_KEYS]).encode())
    for spec in sorted(checkpoint_specs(model_dir).values(), key=lambda t: t.name):
        total.update(json.dumps([spec.name, list(spec.shape)]).encode())
    parts = [vocabulary.get("model"), vocabulary.get("added_tokens")]
    total.update(json.dumps(parts, sort_keys=True).encode())
    return total.hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        problem = f"{path.parent} holds broken JSON in {path.name} ({error})"
        raise FieldError("model", problem, "a whole folder") from error
    if not isinstance(content, dict):
        raise FieldError("model", f"{path} is no JSON object", "a whole folder")
    return content
