"""Headers, digests and identities of weight files, against hashlib and the safetensors package."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ibtree.errors import FieldError
from ibtree.weights.manifest import TensorSpec, WeightManifest
from ibtree.weights.model_folder import INDEX, checkpoint_specs, model_identity
from ibtree.weights.tensor_files import describe, make_manifest, read_header

RNG = np.random.default_rng(0)
TENSORS = {
    "model.b": RNG.normal(size=(2, 3)).astype(np.float32),
    "model.a": RNG.normal(size=(4,)).astype(np.float16),
    "model.ids": np.arange(3),  # int64: a dtype that weights do not have, buffers do
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def raw(header: dict | list | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_describe_hashes_the_tensor_bytes(path):
    specs = {s.name: s for s in describe(path)}
    dtypes = {"model.b": "F32", "model.a": "F16", "model.ids": "I64"}
    assert list(specs) == sorted(TENSORS)
    for name, array in TENSORS.items():
        digest = hashlib.sha256(array.tobytes()).digest()
        assert specs[name] == TensorSpec(name, dtypes[name], array.shape, digest)


def test_metadata_is_no_tensor(path):
    before = describe(path)
    save_file(TENSORS, path, metadata={"format": "pt"})
    assert describe(path) == before


def test_header_offsets_reach_the_bytes(path):
    start, header = read_header(path)
    low, high = header["model.b"]["data_offsets"]
    assert path.read_bytes()[start + low : start + high] == TENSORS["model.b"].tobytes()


def test_every_truncation_and_padding_is_refused(path):
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(FieldError, match=r"w\.safetensors"):
            read_header(path)
    for padding in (b"\0", b"\0" * 4096):
        path.write_bytes(whole + padding)
        with pytest.raises(FieldError, match=f"{len(whole)} bytes"):
            describe(path)


def test_every_bit_of_the_header_counts(path):
    """A flipped bit is refused, or read as another tensor: never a crash, never unnoticed."""
    whole, before = path.read_bytes(), describe(path)
    wrong = []
    for bit in range(8 * read_header(path)[0]):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            if describe(path) == before:
                wrong.append((bit, "unnoticed"))
        except FieldError:
            pass
        except Exception as error:
            wrong.append((bit, repr(error)))
    assert not wrong


def test_a_flipped_data_bit_changes_one_digest(path):
    whole, before = path.read_bytes(), describe(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert sum(a != b for a, b in zip(before, describe(path), strict=True)) == 1


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


BROKEN = {
    "empty file": b"",
    "text": b"not a model",
    "length beyond the file": b"\xff" * 64,
    "header is a list": raw([]),
    "header is null": raw(b"null"),
    "header nested too deep": raw(b"[" * 100_000),
    "entry is a number": raw({"a": 3}),
    "entry is empty": raw({"a": {}}, b"x" * 8),
    "no shape": raw({"a": {"dtype": "I64", "data_offsets": [0, 8]}}, b"x" * 8),
    "shape is null": raw({"a": ENTRY | {"shape": None}}, b"x" * 8),
    "shape of another size": raw({"a": ENTRY | {"shape": [3]}}, b"x" * 8),
    "dtype is a list": raw({"a": ENTRY | {"dtype": ["F32"]}}, b"x" * 8),
    "offsets descend": raw({"a": ENTRY | {"data_offsets": [8, 0]}}, b"x" * 8),
    "negative offset": raw({"a": ENTRY | {"data_offsets": [-8, 0]}}),
    "one offset": raw({"a": ENTRY | {"data_offsets": [0]}}, b"x" * 8),
    "fractional offsets": raw({"a": ENTRY | {"data_offsets": [0.0, 8.0]}}, b"x" * 8),
    "a tensor beyond the end": raw({"a": ENTRY, "b": ENTRY | {"data_offsets": [8, 16]}}, b"x" * 8),
    "tensors overlap": raw({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, b"x" * 12),
    "bytes of no tensor": raw({"a": ENTRY | {"data_offsets": [8, 16]}}, b"x" * 16),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_files_are_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(FieldError, match=r"x\.safetensors"):
        describe(path)


def test_manifest_of_a_file(path):
    manifest = make_manifest(path, 7, "model")
    assert (manifest.version, manifest.model_id, manifest.base_version) == (7, "model", None)
    assert manifest.file_bytes == path.stat().st_size and manifest.tensors == describe(path)
    assert len(manifest.digest) == 32


def test_digest_ignores_order_and_sees_every_field():
    a = TensorSpec("a", "F32", (2, 3), b"1" * 32)
    b = TensorSpec("b", "F16", (6,), b"2" * 32)
    digest = WeightManifest(1, "m", (a, b), 100).digest
    assert WeightManifest(2, "m", (b, a), 100).digest == digest
    others = [
        (replace(a, name="c"), b),
        (replace(a, dtype="BF16"), b),
        (replace(a, shape=(3, 2)), b),
        (replace(a, sha256=b"3" * 32), b),
        (replace(a, sha256=b.sha256), replace(b, sha256=a.sha256)),
        (a,),
        (a, b, replace(b, name="c")),
    ]
    digests = {WeightManifest(1, "m", tensors, 100).digest for tensors in others}
    assert len(digests) == len(others) and digest not in digests


def model(folder: Path, *, width: int = 4, seed: int = 0, vocab: tuple[str, ...] = ("x", "y")):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(2):
        tensor = {f"layer.{i}": rng.normal(size=(3, width)).astype(np.float32)}
        save_file(tensor, folder / f"model-{i}.safetensors", metadata={"format": "pt"})
    weight_map = {f"layer.{i}": f"model-{i}.safetensors" for i in range(2)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    words = {"model": {"vocab": {w: i for i, w in enumerate(vocab)}}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(words))
    return folder


def test_identity_is_the_architectures_not_the_weights(tmp_path):
    identity = model_identity(model(tmp_path / "one"))
    assert len(identity) == 64 and int(identity, 16)
    assert model_identity(model(tmp_path / "step-100", seed=1)) == identity
    assert model_identity(model(tmp_path / "wide", width=5)) != identity
    assert model_identity(model(tmp_path / "words", vocab=("x", "z"))) != identity
    assert model_identity(model(tmp_path / "order", vocab=("y", "x"))) != identity
    bare = model(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    assert model_identity(bare) != identity


def test_identity_ignores_how_tensors_are_spread_over_files(tmp_path):
    first, second = model(tmp_path / "one"), model(tmp_path / "two")
    for path in second.glob("model*"):
        path.unlink()
    zeros = {f"layer.{i}": np.zeros((3, 4), np.float32) for i in (1, 0)}
    save_file(zeros, second / "model.safetensors")
    assert model_identity(second) == model_identity(first)
    assert checkpoint_specs(second) == checkpoint_specs(first)
    assert checkpoint_specs(first)["layer.0"] == TensorSpec("layer.0", "F32", (3, 4))


@pytest.mark.parametrize(("missing", "named"), [("config.json", "config"), ("model*", "safe")])
def test_a_folder_that_is_no_model_is_refused(tmp_path, missing, named):
    folder = model(tmp_path / "m")
    for path in folder.glob(missing):
        path.unlink()
    with pytest.raises(FieldError, match=named):
        model_identity(folder)
