"""Which files and tensors of a Hugging Face folder are the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ibtree.errors import FieldError
from ibtree.weights.model_folder import (
    INDEX,
    checkpoint_specs,
    model_identity,
    stored_dtype,
    weight_files,
)

NAMES = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
SHARDS = {"model-1.safetensors": NAMES[:2], "model-2.safetensors": NAMES[2:]}


def write(path: Path, *names: str, rows: int = 3, dtype: type = np.float32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ones((rows, 2), dtype) for name in names}, path)


def sharded(folder: Path, **config: object) -> Path:
    """A folder of two files with an index, and files that are none of the model's."""
    for name, tensors in SHARDS.items():
        write(folder / name, *tensors)
    weight_map = {tensor: name for name, tensors in SHARDS.items() for tensor in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


STRAY = (
    "model.safetensors", "consolidated.safetensors", "adapter_model.safetensors", "x.safetensors",
)  # fmt: skip


@pytest.mark.parametrize("stray", STRAY)
def test_beside_an_index_only_the_files_that_it_names_count(tmp_path, stray):
    folder = sharded(tmp_path)
    specs, identity = checkpoint_specs(folder), model_identity(folder)
    write(folder / stray, "model.norm.weight", "layers.0.attention.wq.weight", rows=5)
    assert {path.name for path in weight_files(folder)} == set(SHARDS)
    assert checkpoint_specs(folder) == specs and set(specs) == set(NAMES)
    assert model_identity(folder) == identity


@pytest.mark.parametrize("stray", STRAY[1:])
@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_without_an_index_one_file_counts(tmp_path, name, stray):
    write(tmp_path / name, *NAMES)
    if (name, stray) != ("weights.safetensors", "x.safetensors"):
        write(tmp_path / stray, "another")
    assert [path.name for path in weight_files(tmp_path)] == [name]
    assert set(checkpoint_specs(tmp_path)) == set(NAMES)


def test_several_files_without_an_index_are_refused(tmp_path):
    for name, tensors in SHARDS.items():
        write(tmp_path / name, *tensors)
    with pytest.raises(FieldError, match=r"model: .* holds 2 .* and no model"):
        checkpoint_specs(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    folder = sharded(tmp_path)
    (folder / "model-2.safetensors").unlink()
    for look in (weight_files, checkpoint_specs, model_identity):
        with pytest.raises(FieldError, match=r"model: .*model-2\.safetensors is missing"):
            look(folder)


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "null", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\xff"]
)
def test_a_broken_index_is_named(tmp_path, content):
    write(tmp_path / "model.safetensors", *NAMES)
    (tmp_path / INDEX).write_bytes(content.encode("latin-1"))
    with pytest.raises(FieldError, match=r"model: .*json"):
        checkpoint_specs(tmp_path)


@pytest.mark.parametrize(
    ("config", "left_out"),
    [
        ({}, set()),
        ({"tie_word_embeddings": False}, set()),
        ({"tie_word_embeddings": True}, {"lm_head.weight"}),
        ({"text_config": {"tie_word_embeddings": True}}, {"lm_head.weight"}),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, set()),
    ],
)
def test_a_head_that_is_tied_is_none_of_the_tensors(tmp_path, config, left_out):
    assert set(checkpoint_specs(sharded(tmp_path, **config))) == set(NAMES) - left_out


def test_rotary_tables_are_none_of_the_tensors(tmp_path):
    tables = [f"model.layers.{n}.self_attn.rotary_emb.inv_freq" for n in range(2)]
    write(tmp_path / "old" / "model.safetensors", *NAMES, *tables)
    write(tmp_path / "new" / "model.safetensors", *NAMES)
    for name in ("old", "new"):
        (tmp_path / name / "config.json").write_text("{}")
    assert checkpoint_specs(tmp_path / "old") == checkpoint_specs(tmp_path / "new")
    assert model_identity(tmp_path / "old") == model_identity(tmp_path / "new")


def test_the_stored_dtype_is_that_of_most_elements(tmp_path):
    write(tmp_path / "model.safetensors", *NAMES, dtype=np.float16)
    assert stored_dtype(tmp_path) == "F16"
    sizes = {"a": (3, np.float32), "b": (9, np.float16), "c": (5, np.float32)}
    tensors = {name: np.ones(size, dtype) for name, (size, dtype) in sizes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert stored_dtype(tmp_path) == "F16"
