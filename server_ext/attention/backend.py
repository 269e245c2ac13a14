"""SGLang's attention backend `ibtree_cpu`."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from server_ext.attention import kernel, padded, paged
from server_ext.attention.names import ATTENTION_BACKEND
from server_ext.attention.plan import (
    Ints,
    Plan,
    Queries,
    decode_queries,
    extend_queries,
    forest,
    unshared,
)

logger = logging.getLogger(__name__)


def create(runner: Any) -> Any:
    """The factory of `--attention-backend ibtree_cpu`. Raises ValueError for what it can not do."""
    instead = "choose another with --attention-backend, torch_native for one"
    refused = {
        f"device {runner.device}": runner.device != "cpu",
        "multi-head latent attention (MLA)": runner.use_mla_backend,
        "speculative decoding": not runner.spec_algorithm.is_none(),
    }
    for what, is_so in refused.items():
        if is_so:
            raise ValueError(f"attention backend {ATTENTION_BACKEND}: no {what}; {instead}")
    return IbTreeCpuBackend(runner)


class IbTreeCpuBackend(TorchNativeAttnBackend):  # type: ignore[misc]
    """Decode and extend of a whole batch in one pass; shared runs of slots are read once.

    Cross attention, encoders and encoder-decoder models run as in SGLang's `torch_native`.
    """

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self._batch: _Batch | None = None
        kernel.library()  # built at the start, not under the first request

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        mode = forward_batch.forward_mode
        if mode.is_idle() or forward_batch.encoder_lens is not None:
            self._batch = None
            return
        rows = forward_batch.req_pool_indices.numpy().astype(np.int64)
        lengths = forward_batch.seq_lens.numpy().astype(np.int64)
        table = self.req_to_token_pool.req_to_token
        if mode.is_decode():
            plan = self._grown(table, rows, lengths) or _plan(table, rows, lengths)
            self._batch = _Batch(rows, lengths, plan, decode_queries(plan, lengths), True)
        else:
            new = forward_batch.extend_seq_lens.numpy().astype(np.int64)
            plan = _plan(table, rows, lengths)
            self._batch = _Batch(rows, lengths, plan, extend_queries(plan, lengths, new), False)

    def _grown(self, table: torch.Tensor, rows: Ints, lengths: Ints) -> Plan | None:
        """The last step's plan, if this is the same batch with one more token each.

        That the rows still agree is looked up as well: SGLang moves slots and reuses rows.
        """
        last = self._batch
        if last is None or not last.is_decode or not np.array_equal(last.rows, rows):
            return None
        if not np.array_equal(last.lengths + 1, lengths) or not last.plan.holds(table, rows):
            return None
        return last.plan

    def forward_extend(
        self,
        q: Any,
        k: Any,
        v: Any,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **more: Any,
    ) -> Any:
        _check(layer, more)
        if self._is_encoding(layer):
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(
        self,
        q: Any,
        k: Any,
        v: Any,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **more: Any,
    ) -> Any:
        _check(layer, more)
        if self._is_encoding(layer):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache)

    def _is_encoding(self, layer: Any) -> bool:
        return bool(
            self._batch is None
            or layer.is_cross_attention
            or layer.attn_type != AttentionType.DECODER
        )

    def _attend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool
    ) -> Any:
        assert self._batch is not None
        pool = self.token_to_kv_pool
        if save_kv_cache and k is not None and v is not None:
            location = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
            pool.set_kv_buffer(layer, location, k, v)
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = q.new_empty(q.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        attend = paged.attend if paged.takes(q, keys, values) else padded.attend
        attend(
            q,
            keys,
            values,
            out,
            self.req_to_token_pool.req_to_token,
            self._batch.plan,
            self._batch.queries,
            layer.scaling,
            layer.logit_cap,
            layer.sliding_window_size,
            self._slot_map(layer),
        )
        return out.flatten(1)

    def _slot_map(self, layer: Any) -> torch.Tensor | None:
        """From slots of the whole pool to those of the layer's, which holds windows only."""
        pool = self.token_to_kv_pool
        if not isinstance(pool, SWAKVPool):
            return None
        _, is_window = pool.layers_mapping[layer.layer_id]
        return pool.full_to_swa_index_mapping if is_window else None


class _Batch:
    """What one forward pass knows: made once for all layers."""

    def __init__(
        self, rows: Ints, lengths: Ints, plan: Plan, queries: Queries, is_decode: bool
    ) -> None:
        self.rows, self.lengths = rows, lengths
        self.plan, self.queries = plan, queries
        self.is_decode = is_decode


def _plan(table: torch.Tensor, rows: Ints, lengths: Ints) -> Plan:
    return unshared(rows) if kernel.library() is None else forest(table, rows, lengths)


def _check(layer: Any, more: dict[str, Any]) -> None:
    """Raises NotImplementedError for what would silently be left out."""
    given = [name for name, value in more.items() if value is not None]
    if given:
        what = ", ".join(given)
    elif layer.logit_cap and layer.logit_capping_method != "tanh":
        what = f"logit capping by {layer.logit_capping_method}"
    elif layer.xai_temperature_len > 0:
        what = "temperatures by length"
    else:
        return
    raise NotImplementedError(
        f"attention backend {ATTENTION_BACKEND}: no {what}; choose another: --attention-backend"
    )
