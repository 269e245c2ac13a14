"""A Hugging Face model folder: the tensors it holds, and its identity."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ibtree.errors import FieldError
from ibtree.weights.manifest import TensorSpec
from ibtree.weights.tensor_files import read_header

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
    """Names, dtypes and shapes of a Hugging Face folder's safetensors, digests left empty.

    Raises FieldError if the folder holds none.
    """
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise FieldError("model", f"{model_dir} holds no *.safetensors", "a Hugging Face folder")
    return {
        name: TensorSpec(name, entry["dtype"], tuple(entry["shape"]))
        for path in files
        for name, entry in read_header(path)[1].items()
    }


def model_identity(model_dir: Path) -> str:
    """Digest of a model's tensors (names, shapes), of what its configuration says of the forward
    pass, and of its tokenizer: 64 hex characters.

    Two checkpoints of one training run have the same identity; another architecture, size or
    vocabulary has another. Raises FieldError if `model_dir` is not a Hugging Face folder.
    """
    if not (model_dir / "config.json").is_file():
        raise FieldError("model", f"{model_dir} has no config.json", "a Hugging Face model folder")
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        tokenizer = model_dir / "tokenizer.json"
        vocabulary = json.loads(tokenizer.read_text("utf-8")) if tokenizer.is_file() else {}
    except ValueError as error:
        raise FieldError(
            "model", f"{model_dir} holds broken JSON ({error})", "a whole folder"
        ) from error
    total = hashlib.sha256()
    total.update(json.dumps([config.get(key) for key in _IDENTITY_KEYS]).encode())
    for spec in sorted(checkpoint_specs(model_dir).values(), key=lambda t: t.name):
        total.update(json.dumps([spec.name, list(spec.shape)]).encode())
    parts = [vocabulary.get("model"), vocabulary.get("added_tokens")]
    total.update(json.dumps(parts, sort_keys=True).encode())
    return total.hexdigest()
