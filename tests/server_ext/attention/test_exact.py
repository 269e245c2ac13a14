"""Attention against the formula in float64: the kernel with and without sharing, and torch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from server_ext.attention import kernel, padded, paged
from server_ext.attention.plan import Plan, decode_queries, extend_queries, forest, unshared
from tests.server_ext.attention.batches import Batch, Shape, batch

ARMS = ("shared", "alone", "torch")
FLOAT32_ERROR = 1e-5
BFLOAT16 = torch.bfloat16


@pytest.fixture(autouse=True, scope="module")
def built():
    assert kernel.library() is not None


def found(of: Batch, arm: str, threads: int = 2, plan: Plan | None = None) -> torch.Tensor:
    shape = of.shape
    if plan is None:
        alone = arm == "alone"
        plan = unshared(of.rows) if alone else forest(of.table, of.rows, of.lengths)
    if (of.new == 1).all():
        queries = decode_queries(plan, of.lengths)
    else:
        queries = extend_queries(plan, of.lengths, of.new)
    out = torch.full((*of.q.shape[:2], shape.v_dim), torch.nan, dtype=of.q.dtype)
    attend = padded.attend if arm == "torch" else paged.attend
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        attend(of.q, of.k, of.v, out, of.table, plan, queries, shape.scale, shape.cap, shape.window)
    finally:
        torch.set_num_threads(before)
    return out


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error of a query's and head's output, relative to its norm."""
    off = (out.double() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-12)
    return float(off.nan_to_num(torch.inf).max())


def torch_bfloat16_error(of: Batch, exact: torch.Tensor) -> float:
    """Of torch's own bfloat16 attention on the same input."""
    shape, outs, at = of.shape, [], 0
    for row, length, new in zip(of.rows, of.lengths, of.new, strict=True):
        slots = of.table[row, :length].long()
        q, k, v = (x.transpose(0, 1)[None] for x in (of.q[at : at + new], of.k[slots], of.v[slots]))
        position, key = torch.arange(length - new, length)[:, None], torch.arange(length)
        mask = (key <= position) & ((key >= position - shape.window) | (shape.window < 0))
        out = scaled_dot_product_attention(q, k, v, mask, scale=shape.scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
        at += new
    return error(torch.cat(outs), exact)


def check(of: Batch, arms: tuple[str, ...] = ARMS) -> None:
    exact = of.reference()
    for arm in arms:
        off = error(found(of, arm), exact)
        if of.shape.dtype is torch.float32:
            assert off <= FLOAT32_ERROR, (arm, of.shape, off)
        elif of.shape.cap:  # torch has no soft cap to compare with
            assert off <= 2**-6, (arm, of.shape, off)
        else:
            theirs = torch_bfloat16_error(of, exact)
            assert off <= 1.5 * theirs + 2**-9, (arm, of.shape, off, theirs)


SHAPES = [  # KV heads, queries a KV head, dimensions of keys and of values, soft cap, window
    (8, 1, 64, 64, 0, -1),
    (2, 7, 64, 64, 0, 40),
    (3, 2, 16, 32, 30, -1),
    (1, 8, 256, 128, 5, 17),
    (2, 7, 80, 80, 0, -1),
    (1, 16, 192, 128, 50, 300),
    (4, 3, 33, 17, 0, 0),
    (5, 1, 96, 250, 0, -1),
    (1, 1, 1, 24, 2, 64),
]


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["decode", "extend", "mixed"])
@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_random_forests(number, mode, dtype):
    rng = np.random.default_rng([number, len(mode)])
    kv_heads, group, dim, v_dim, cap, window = SHAPES[number]
    shape = Shape(kv_heads, group, dim, v_dim, dtype, dim**-0.5, cap, window)
    for sequences, longest, page in [(1, 1, 1), (1, 200, 16), (9, 150, 1), (24, 90, 64)]:
        check(batch(rng, shape, sequences, longest, mode, page))


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=["float32", "bfloat16"])
def test_many_and_long_sequences(dtype):
    rng = np.random.default_rng(5)
    shape = Shape(kv_heads=1, group=7, dim=32, v_dim=32, dtype=dtype)
    check(batch(rng, shape, 256, 60))
    check(batch(rng, shape, 4, 8000, shared=1.0))
    check(batch(rng, shape, 1, 8000), ("alone",))


def test_a_run_under_every_sequence_and_identical_sequences():
    rng = np.random.default_rng(6)
    of = batch(rng, Shape(), 12, 200, shared=0.0)
    of.lengths[:] = 200
    of.table[of.rows, :200] = of.table[of.rows[0], :200].clone()
    plan = forest(of.table, of.rows, of.lengths)
    assert len(plan.runs) == 13 and list(plan.runs[0, 1:]) == [0, 200, 0, 11]
    check(of)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_and_bits(threads):
    rng = np.random.default_rng(7)
    of = batch(rng, Shape(dtype=BFLOAT16), 10, 700)
    plan = forest(of.table, of.rows, of.lengths)
    first = found(of, "shared", threads, plan)
    assert error(first, of.reference()) < 2**-7
    assert torch.equal(first, found(of, "shared", threads, plan))


def test_any_strides_and_mapped_slots():
    rng = np.random.default_rng(8)
    for dtype in (torch.float32, BFLOAT16):
        of = batch(rng, Shape(dtype=dtype), 6, 100, "mixed")
        exact = of.reference()
        k, v = (torch.randn(len(x), 3, 5, 80).to(dtype) for x in (of.k, of.v))
        shuffle = torch.from_numpy(rng.permutation(len(of.k)))
        k[shuffle, 1, 1:3, 7:71], v[shuffle, 2, ::4, :64] = of.k, of.v
        q = torch.zeros(len(of.q), 15, 70, dtype=dtype)
        q[:, :14, 3:67] = of.q
        for attend, plan in itertools.product(
            (paged.attend, padded.attend),
            (unshared(of.rows), forest(of.table, of.rows, of.lengths)),
        ):
            out = torch.full((len(of.q), 16, 99), torch.nan, dtype=dtype)[:, 1:15, 9:73]
            attend(
                q[:, :14, 3:67], k[:, 1, 1:3, 7:71], v[:, 2, ::4, :64], out, of.table, plan,
                extend_queries(plan, of.lengths, of.new), of.shape.scale, slot_map=shuffle,
            )  # fmt: skip
            assert error(out, exact) < (FLOAT32_ERROR if dtype is torch.float32 else 2**-7)


def test_float16_and_mixed_types():
    rng = np.random.default_rng(9)
    of = batch(rng, Shape(dtype=torch.float16), 5, 60, "extend")
    assert not paged.takes(of.q, of.k, of.v)
    assert error(found(of, "torch"), of.reference()) < 2**-9
    of.q, of.k, of.v = of.q.float(), of.k.to(BFLOAT16), of.v.to(BFLOAT16)
    assert paged.takes(of.q, of.k, of.v)
    for arm in ARMS:
        assert error(found(of, arm), of.reference()) < FLOAT32_ERROR
