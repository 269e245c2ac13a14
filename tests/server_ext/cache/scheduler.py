"""Drives the real radix backend, on SGLang's real tree core and allocator, as a scheduler does.

Beside it runs the naive reference: what each KV slot holds (which weights computed it, for which
prefix), and a dictionary of every prefix that was ever cached.
"""

from __future__ import annotations

import server_ext.engine.cpu  # isort: skip

import dataclasses
from array import array
from types import SimpleNamespace
from typing import Any

server_ext.engine.cpu.select()

import torch
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from server_ext.cache import radix
from server_ext.cache.names import FRACTION_VARIABLE
from server_ext.cache.radix import IbTreeCache

__all__ = ["FRACTION_VARIABLE", "MAX_TOKENS", "Prefix", "Request", "Scheduler"]

MAX_TOKENS = 96
Prefix = tuple[int, ...]


@dataclasses.dataclass(eq=False)
class Request:
    """The fields of SGLang's Req that the cache uses."""

    rid: str
    origin_input_ids: array[int]
    output_ids: array[int] = dataclasses.field(default_factory=lambda: array("q"))
    kv: Any = dataclasses.field(default_factory=ReqKvInfo)
    extra_key: str | None = None
    cache_salt: str | None = None
    priority: int | None = None
    session_id: str | None = None
    session: Any = None
    kv_rotation_base: int | None = None
    swa_prefix_lock_released: bool = False
    cached_tokens: int = 0
    retracted_stain: bool = False
    last_node: Any = None
    lock_receipt: Any = None
    prefix_indices: Any = None
    computed_by: list[int] = dataclasses.field(default_factory=list)

    @property
    def tokens(self) -> Prefix:
        return (*self.origin_input_ids, *self.output_ids)

    def get_fill_ids(self) -> array[int]:
        return self.origin_input_ids + self.output_ids


class Scheduler:
    """`weights` counts updates; a request computes its KV with those that are current."""

    def __init__(self, monkeypatch: Any, pool_tokens: int, core: str = "rust") -> None:
        self.label, self.weights = "0", 0
        monkeypatch.setattr(
            radix, "get_serving", lambda: SimpleNamespace(weight_version=self.label)
        )
        self.rows = ReqToTokenPool(32, MAX_TOKENS + 1, "cpu", False)
        self.allocator = TokenToKVPoolAllocator(pool_tokens, torch.int64, "cpu", None, False)
        self.cache = IbTreeCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self.rows,
                token_to_kv_pool_allocator=self.allocator,
                page_size=1,
                tree_components=(ComponentType.FULL,),
                tree_core_backend=core,
            )
        )
        self.pool_tokens = pool_tokens
        self.holds: dict[int, tuple[int, Prefix]] = {}
        """Weights that computed each slot, and the prefix it is the last token of."""
        self.ever: set[tuple[int, Prefix]] = set()
        """Every prefix that was ever in the cache, with its weights."""
        self.running: list[Request] = []

    # ---- what a scheduler does

    def start(self, rid: str, prompt: Prefix) -> Request | None:
        """Matches, locks, allocates and "computes" a prompt. None: there is no room."""
        request = Request(rid, array("q", prompt))
        if not self._prefill(request):
            return None
        request.cached_tokens = len(request.prefix_indices)
        self.running.append(request)
        self.cache.cache_unfinished_req(request)
        self._was_cached(request, len(prompt))
        return request

    def _prefill(self, request: Request) -> bool:
        tokens = request.tokens
        slots = self.match(tokens[:-1], request)
        request.prefix_indices = slots
        new = len(tokens) - len(slots)
        # SGLang locks first, then asks for room
        request.lock_receipt = self.cache.inc_lock_ref(request.last_node).to_dec_params()
        if not self._room(new):
            self.cache.dec_lock_ref(request.last_node, request.lock_receipt)
            return False
        request.kv.req_pool_idx = self.rows.free_slots.pop()
        request.kv.cache_protected_len = len(slots)
        mine = torch.cat([slots, self.allocator.alloc(new)])
        self.rows.write((request.kv.req_pool_idx, slice(0, len(mine))), mine.int())
        for at in range(len(slots), len(tokens)):
            self.holds[int(mine[at])] = self.weights, tokens[: at + 1]
        return True

    def decode(self, request: Request, token: int) -> bool:
        """One more token. False: there is no room."""
        if not self._room(1):
            return False
        request.output_ids.append(token)
        [slot] = self.allocator.alloc(1)
        at = len(request.tokens) - 1
        self.rows.write((request.kv.req_pool_idx, at), slot.int())
        self.holds[int(slot)] = self.weights, request.tokens
        return True

    def finish(self, request: Request) -> None:
        """Everything but the last token has KV; it goes into the cache."""
        tokens = len(request.tokens) - 1
        self.allocator.free(self._row(request)[tokens : tokens + 1])
        self.cache.insert_req(request, up_to=tokens)
        self._was_cached(request, tokens)
        self._release(request, tokens)

    def abort(self, request: Request) -> None:
        self._release(request, len(request.tokens))

    def update(self, label: str) -> None:
        """New weights, while requests run on (SGLang's pause mode `in_place`)."""
        self.label = label
        self.weights += 1
        self.cache.weights_changed()

    def retract(self) -> None:
        """Every running request gives its KV back and computes it again (mode `retract`)."""
        for request in list(self.running):
            self._release(request, len(request.tokens))
            request.kv, request.swa_prefix_lock_released = ReqKvInfo(), False
            request.retracted_stain = True
            if self._prefill(request):
                self.running.append(request)
                self.cache.cache_unfinished_req(request)
                self._was_cached(request, len(request.tokens))

    # ---- what the reference says

    def match(self, prefix: Prefix, request: Request | None = None) -> torch.Tensor:
        """What the cache finds, checked slot by slot."""
        key = RadixKey(array("q", prefix))
        result = self.cache.match_prefix(MatchPrefixParams(key=key, req=request))
        if request:
            request.last_node = result.last_device_node
        for at, slot in enumerate(result.device_indices.tolist()):
            assert self.holds[slot] == (self.weights, prefix[: at + 1]), "KV of something else"
        n = len(result.device_indices)
        assert n == 0 or (self.weights, prefix[:n]) in self.ever, "a prefix nobody cached"
        return result.device_indices

    def cached(self, path: Prefix) -> int:
        """How many tokens of the path are cached now, without touching it."""
        key = self.cache._key(RadixKey(array("q", path)))
        return int(self.cache.tree_core.match_full_device_prefix(key)[0])

    def check(self) -> None:
        """Nothing is lost, nothing is held twice."""
        locked = self.cache.protected_size()
        free, evictable = self.allocator.available_size(), self.cache.evictable_size()
        own = sum(len(r.tokens) - r.kv.cache_protected_len for r in self.running)
        assert free + evictable + locked + own == self.pool_tokens
        if not self.running:
            assert locked == 0
        self.cache.sanity_check() if not self.running else None

    def _room(self, tokens: int) -> bool:
        short = tokens - self.allocator.available_size()
        if short > 0:
            self.cache.evict_for_alloc(EvictParams(num_tokens=short))
        return self.allocator.available_size() >= tokens

    def _row(self, request: Request) -> torch.Tensor:
        return self.rows.req_to_token[request.kv.req_pool_idx].to(torch.int64)

    def _release(self, request: Request, tokens: int) -> None:
        self.allocator.free(self._row(request)[request.kv.cache_protected_len : tokens])
        self.cache.dec_lock_ref(request.last_node, request.lock_receipt)
        self.rows.free_slots.append(request.kv.req_pool_idx)
        self.running.remove(request)

    def _was_cached(self, request: Request, tokens: int) -> None:
        whose = request.ibtree_weights.updates  # type: ignore[attr-defined]
        self.ever |= {(whose, request.tokens[:n]) for n in range(1, tokens + 1)}
