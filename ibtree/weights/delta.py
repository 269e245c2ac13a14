"""Lossless deltas between two versions of the same tensors.

A delta is a safetensors file that holds, under the name of each tensor whose bytes changed, a U8
vector of records, one for every `_BLOCK` elements of the tensor in order:

    record  = bytes of the frame (u32, little endian), frame
    frame   = zstd(changed elements (u32), gap bytes (u32), gaps, planes)
    gaps    = for each changed element how many unchanged ones lie before it in the block, in bytes;
              255 stands for "255, and go on"
    planes  = the changes, (new - old) mod 2^bits of the bit patterns, zigzag; all lowest bytes
              first, then all second ones, …

At the learning rates of RL few elements change in the wire's precision, mostly by one unit in the
last place, so a change costs about a byte. Deltas of XORed bytes are twice as large and slower.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ibtree.errors import FieldError
from ibtree.weights.tensor_files import DTYPE_BYTES, mapped, write_file

Bits = NDArray[Any]
"""A tensor's bit patterns: unsigned integers of its element's width, one-dimensional."""

_BLOCK = 2**18
_ZSTD_LEVEL = 1
_INTEGER_TYPES = {2: (np.uint16, np.int16), 4: (np.uint32, np.int32)}
_THREADS = 2


def bits(data: Any, dtype: str) -> Bits:
    """Bytes of a tensor of this safetensors dtype as bit patterns, without a copy.

    Raises FieldError for a dtype that weights do not have.
    """
    if dtype not in DTYPE_BYTES:
        raise FieldError("weights", f"dtype {dtype}", " | ".join(DTYPE_BYTES))
    return np.frombuffer(data, _INTEGER_TYPES[DTYPE_BYTES[dtype]][0])


def encode(old: Bits, new: Bits) -> bytes:
    """The records that turn `old` into `new`; empty if they are equal."""
    import zstandard

    compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
    records, changed = [], False
    for at in range(0, len(new), _BLOCK):
        difference = new[at : at + _BLOCK] - old[at : at + _BLOCK]
        where = np.flatnonzero(difference != 0)
        changed |= len(where) > 0
        frame = compressor.compress(_frame(where, difference[where]))
        records += [len(frame).to_bytes(4, "little"), frame]
    return b"".join(records) if changed else b""


def _frame(where: NDArray[np.int64], difference: Bits) -> bytes:
    gaps = _gap_bytes(np.diff(where, prepend=-1) - 1)
    sizes = np.array([len(where), len(gaps)], np.uint32)
    signed = difference.view(_INTEGER_TYPES[difference.itemsize][1])
    zigzag = (signed << 1) ^ (signed >> (8 * difference.itemsize - 1))
    planes = zigzag.view(np.uint8).reshape(-1, difference.itemsize).T
    return sizes.tobytes() + gaps.tobytes() + planes.tobytes()


def _gap_bytes(gaps: NDArray[np.int64]) -> NDArray[np.uint8]:
    more = gaps // 255
    last = np.cumsum(more + 1) - 1
    out = np.full(int(last[-1]) + 1 if len(last) else 0, 255, np.uint8)
    out[last] = gaps - 255 * more
    return out


def apply(
    values: Bits, records: Any, seen: Callable[[memoryview], object] = lambda _: None
) -> None:
    """Turns `values` into the new version, in place, showing each block to `seen` when it is done.

    Raises FieldError if the records are broken; some blocks may then be new and others old.
    """
    import zstandard

    decompressor, data = zstandard.ZstdDecompressor(), memoryview(records).cast("B")
    offset = 0
    for at in range(0, len(values), _BLOCK):
        block = values[at : at + _BLOCK]
        size = int.from_bytes(data[offset : offset + 4], "little")
        frame = data[offset + 4 : offset + 4 + size]
        offset += 4 + size
        if len(frame) != size or not size:
            raise _broken("a record is cut")
        try:
            if zstandard.frame_content_size(frame) > _most_bytes(block):  # -1: it does not say
                raise _broken("a frame is too large")
            content = decompressor.decompress(frame, max_output_size=_most_bytes(block))
        except zstandard.ZstdError as error:
            raise _broken(str(error)) from error
        _apply_frame(block, content)
        seen(block.data)
    if offset != len(data):
        raise _broken("bytes behind the last record")


def _most_bytes(block: Bits) -> int:
    return 8 + len(block) * (2 + block.itemsize)


def _apply_frame(block: Bits, content: bytes) -> None:
    width = block.itemsize
    count, gap_bytes = (int(n) for n in np.frombuffer(content[:8].ljust(8, b"\xff"), np.uint32))
    if len(content) != 8 + gap_bytes + width * count:
        raise _broken("a frame has a wrong size")
    gaps = np.frombuffer(content, np.uint8, gap_bytes, 8)
    where = np.cumsum(gaps, dtype=np.int64)[gaps != 255]
    where += np.arange(len(where))
    if len(where) != count or (gap_bytes and gaps[-1] == 255):
        raise _broken("a frame has wrong gaps")
    if count and where[-1] >= len(block):
        raise _broken("a frame reaches beyond its block")
    planes = np.frombuffer(content, np.uint8, width * count, 8 + gap_bytes).reshape(width, count)
    zigzag = np.ascontiguousarray(planes.T).view(block.dtype).reshape(-1)
    block[where] += (zigzag >> 1) ^ (0 - (zigzag & 1))


def _broken(problem: str) -> FieldError:
    return FieldError("weights", f"a broken delta: {problem}", "a delta as ibtpo-learner makes it")


def write_delta(base: Path, new: Path, delta: Path) -> int:
    """Writes the delta between two whole files of the same tensors; returns its size [bytes].

    Raises FieldError if they do not hold the same names, dtypes and shapes.
    """
    old, fresh = mapped(base), mapped(new)
    if [t.spec for t in old.values()] != [t.spec for t in fresh.values()]:
        raise FieldError("weights", f"{new.name} has other tensors than the base", "the same")

    def records(name: str) -> bytes:
        dtype = fresh[name].spec.dtype
        return encode(bits(old[name].data, dtype), bits(fresh[name].data, dtype))

    largest_first = sorted(fresh, key=lambda name: -len(fresh[name].data))
    with ThreadPoolExecutor(_THREADS) as pool:
        encoded = dict(zip(largest_first, pool.map(records, largest_first), strict=True))
    changed = {name: encoded[name] for name in sorted(encoded) if encoded[name]}
    write_file(delta, {n: ("U8", (len(data),), data) for n, data in changed.items()})
    return delta.stat().st_size
