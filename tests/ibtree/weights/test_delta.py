"""Deltas: lossless against plain comparison, small at RL learning rates, broken ones refused."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file, save_file

from ibtree.errors import FieldError
from ibtree.weights import delta as weight_delta
from ibtree.weights.delta import apply, bits, encode, write_delta
from ibtree.weights.tensor_files import describe, mapped

WIDTHS = pytest.mark.parametrize("kind", [np.uint16, np.uint32])


@pytest.fixture(params=[5, 2**18], ids=["small blocks", "blocks"])
def block(request, monkeypatch) -> int:
    monkeypatch.setattr(weight_delta, "_BLOCK", request.param)
    return request.param


def applied(old: np.ndarray, records: bytes) -> np.ndarray:
    values = old.copy()
    apply(values, records)
    return values


def changed(old: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Some elements moved by a unit in the last place, a few anywhere."""
    new = old.copy()
    where = np.flatnonzero(rng.random(len(old)) < share)
    new[where] += rng.choice([1, -1], len(where)).astype(old.dtype)
    new[where[::7]] = rng.integers(0, np.iinfo(old.dtype).max, len(where[::7]), old.dtype)
    return new


@WIDTHS
@pytest.mark.parametrize("share", [0.0, 1e-4, 0.003, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 5, 6, 1000, 300_001])
def test_the_result_is_the_new_tensor_to_the_bit(kind, share, size):
    rng = np.random.default_rng(size)
    old = rng.integers(0, np.iinfo(kind).max, size, kind)
    new = changed(old, share, rng)
    records = encode(old, new)
    assert bool(records) == bool((old != new).any())
    if records:
        assert np.array_equal(applied(old, records), new)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 40).flatmap(
        lambda n: st.tuples(arrays(np.uint16, n), arrays(np.uint16, n), arrays(np.bool_, n))
    )
)
def test_any_change_of_any_bits(trio):
    old, other, same = trio
    new = np.where(same, old, other)
    records = encode(old, new)
    assert np.array_equal(applied(old, records) if records else old, new)


def test_every_length_of_a_gap(block):
    """255 is the byte that says "and go on"."""
    for gap in (0, 1, 4, 5, 6, 253, 254, 255, 256, 509, 510, 511, 1000):
        old = np.zeros(2 * gap + 3, np.uint16)
        new = old.copy()
        new[[gap, 2 * gap + 1]] = 1, 65_535
        assert np.array_equal(applied(old, encode(old, new)), new), gap


def test_blocks_are_shown_in_order_when_they_are_done(block):
    old = np.arange(23, dtype=np.uint16)
    new, seen = old + np.uint16(1), hashlib.sha256()
    apply(old, encode(old, new), seen.update)
    assert seen.digest() == hashlib.sha256(new).digest()


def test_a_step_of_reinforcement_learning_is_small():
    """bf16 of float32 weights that moved by 1e-6: about a byte a changed element."""
    rng = np.random.default_rng(0)
    master = rng.normal(0, 0.02, 1_000_000).astype(np.float32)
    moved = master + rng.choice([1e-6, -1e-6], len(master)).astype(np.float32)
    old, new = rounded(master), rounded(moved)
    assert 0.01 < (old != new).mean() < 0.05
    assert len(encode(old, new)) < 0.6 * 2 * (old != new).sum()
    assert len(encode(old, new)) < 0.03 * new.nbytes


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, to nearest."""
    wide = values.view(np.uint32)
    return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)


@WIDTHS
def test_broken_records_are_refused_or_give_other_values(kind, block):
    """Never another error, never a write elsewhere; what they give is for digests to judge."""
    rng = np.random.default_rng(1)
    old = rng.integers(0, 1000, 64, kind)
    new = changed(old, 0.3, rng)
    records, wrong = encode(old, new), []
    for cut in range(len(records)):
        with pytest.raises(FieldError):
            applied(old, records[:cut])
    for bit in range(8 * len(records)):
        flipped = bytearray(records)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            applied(old, bytes(flipped))
        except FieldError:
            pass
        except Exception as error:
            wrong.append((bit, repr(error)))
    assert not wrong
    with pytest.raises(FieldError, match="behind"):
        applied(old, records + b"\0")


def record(content: bytes, **options: bool) -> bytes:
    frame = zstandard.ZstdCompressor(**options).compress(content)
    return len(frame).to_bytes(4, "little") + frame


def sizes(count: int, gaps: int) -> bytes:
    return np.array([count, gaps], np.uint32).tobytes()


CONTENTS = {
    "empty": b"",
    "short": b"\0" * 7,
    "counts more than is there": sizes(2**31, 1),
    "ends in a gap that goes on": sizes(1, 2) + bytes([0, 255]) + b"\0\0",
    "beyond the block": sizes(1, 1) + bytes([4]) + b"\2\0",
    "far beyond the block": sizes(1, 9) + b"\xff" * 8 + b"\0" + b"\2\0",
    "more gaps than changes": sizes(1, 2) + bytes([0, 0]) + b"\2\0",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_contents_that_no_encoder_writes_are_refused(name):
    values = np.zeros(4, np.uint16)
    with pytest.raises(FieldError, match="broken delta"):
        apply(values, record(CONTENTS[name]))
    assert not values.any()


@pytest.mark.parametrize("sized", [True, False])
def test_a_frame_that_unpacks_to_more_than_a_block_is_refused_unpacked(sized):
    bomb = record(b"\0" * 10**7, write_content_size=sized)
    with pytest.raises(FieldError, match="broken delta"):
        apply(np.zeros(1000, np.uint16), bomb)


def write(path: Path, **tensors: np.ndarray) -> Path:
    save_file(tensors, path)
    return path


def test_a_file_holds_what_changed_and_nothing_else(tmp_path):
    rng = np.random.default_rng(2)
    old = {name: rng.normal(size=(40, 30)).astype(np.float32) for name in "abc"}
    new = old | {"b": np.nextafter(old["b"], np.float32(9))}
    base, fresh = write(tmp_path / "0", **old), write(tmp_path / "1", **new)
    size = write_delta(base, fresh, tmp_path / "d")
    assert size == (tmp_path / "d").stat().st_size
    assert list(load_file(tmp_path / "d")) == ["b"]
    values = bits(mapped(base)["b"].data, "F32").copy()
    apply(values, mapped(tmp_path / "d")["b"].data)
    assert values.tobytes() == new["b"].tobytes()
    specs = {t.name: t for t in describe(fresh)}
    assert hashlib.sha256(values).digest() == specs["b"].sha256


def test_a_version_without_a_change_is_a_file_without_tensors(tmp_path):
    path = write(tmp_path / "0", a=np.ones(3, np.float32))
    write_delta(path, path, tmp_path / "d")
    assert mapped(tmp_path / "d") == {}


@pytest.mark.parametrize(
    "other",
    [
        {"a": np.ones(3, np.float16)},
        {"a": np.ones((3, 1), np.float32)},
        {"b": np.ones(3, np.float32)},
        {"a": np.ones(3, np.float32), "b": np.ones(3, np.float32)},
    ],
)
def test_no_delta_between_other_tensors(tmp_path, other):
    base = write(tmp_path / "0", a=np.ones(3, np.float32))
    with pytest.raises(FieldError, match="other tensors"):
        write_delta(base, write(tmp_path / "1", **other), tmp_path / "d")


def test_dtypes_that_weights_do_not_have_are_refused():
    with pytest.raises(FieldError, match="I64"):
        bits(b"", "I64")


def test_mapped_specs_are_those_of_describe(tmp_path):
    path = write(tmp_path / "0", a=np.ones((3, 1), np.float32), b=np.ones(2, np.float16))
    assert [t.spec for t in mapped(path).values()] == [
        replace(t, sha256=b"") for t in describe(path)
    ]
