"""Attention over paged slots by the C++ kernel."""

from __future__ import annotations

import ctypes

import torch

from server_ext.attention import kernel
from server_ext.attention.plan import Plan, Queries

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the kernel is there and knows these tensors' types and layouts."""
    return (
        kernel.library() is not None
        and q.dtype in DTYPES
        and k.dtype in DTYPES
        and k.dtype == v.dtype
        and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    )


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    table: torch.Tensor,
    plan: Plan,
    queries: Queries,
    scale: float,
    cap: float = 0.0,
    window: int = -1,
    slot_map: torch.Tensor | None = None,
) -> None:
    """Writes softmax(cap · tanh(scale · q kᵀ / cap)) v, without `cap` if that is 0, into `out`.

    q [tokens, query heads, dim] and out [tokens, query heads, v_dim] of one type; k [slots, KV
    heads, dim] and v [slots, KV heads, v_dim] of one type; float32 or bfloat16, any strides but for
    the last dimension. A query at position p sees keys p - window … p (window < 0: 0 … p). `table`
    [requests, positions] int32: slots; `slot_map` int64: these to the slots of k and v, where they
    differ. Sums are float32. The same plan and number of torch's threads give the same bits.
    """
    call = kernel.Call(
        q=q.data_ptr(),
        out=out.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        table=table.data_ptr(),
        slot_map=None if slot_map is None else slot_map.data_ptr(),
        runs=plan.runs.ctypes.data,
        first_query=queries.first.ctypes.data,
        query_token=queries.token.ctypes.data,
        query_position=queries.position.ctypes.data,
        n_runs=len(plan.runs),
        n_queries=len(queries.token),
        q_token=q.stride(0),
        q_head=q.stride(1),
        out_token=out.stride(0),
        out_head=out.stride(1),
        k_slot=k.stride(0),
        k_head=k.stride(1),
        v_slot=v.stride(0),
        v_head=v.stride(1),
        table_stride=table.stride(0),
        q_heads=q.shape[1],
        kv_heads=k.shape[1],
        dim=q.shape[2],
        v_dim=v.shape[2],
        window=window,
        threads=torch.get_num_threads(),
        q_dtype=DTYPES[q.dtype],
        kv_dtype=DTYPES[k.dtype],
        scale=scale,
        cap=cap,
    )
    if kernel.library().attend(ctypes.byref(call)):
        raise MemoryError("attention: no memory for a batch's running softmax")
