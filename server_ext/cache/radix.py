"""The radix-cache backend `ibtree`: keeps open trees' prefixes, one namespace per weight version.

A subclass of SGLang 0.5.21's UnifiedRadixCache on its default (Rust) tree core.

Eviction: the core walks its leaves, least recently used first. A leaf at which a protected path
ends is passed over and then touched, so that the next walk does not meet it again; if nothing
else is left, the oldest open tree is given up, then the next. Nothing is ever pinned: what is
protected still counts as evictable, so admission, sizes and leak checks are SGLang's own.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, InsertResult, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import get_serving

from server_ext.cache.names import DEFAULT_FRACTION, FRACTION_VARIABLE
from server_ext.cache.open_trees import OpenTrees
from server_ext.cache.path_trie import Key


class Weights(NamedTuple):
    """Which weights computed some KV: SGLang's version label, and a count of updates so far (two
    updates under one label are two versions)."""

    label: str | None
    updates: int

    def namespace(self, extra_key: str | None) -> str:
        return f"{extra_key or ''}\x1f{self.label}#{self.updates}"


class IbTreeCache(UnifiedRadixCache):  # type: ignore[misc]
    """What SGLang's scheduler calls; `trees` is driven by control messages (plugin.py)."""

    def __init__(self, params: Any) -> None:
        fraction = float(os.environ.get(FRACTION_VARIABLE, DEFAULT_FRACTION))
        allocator = params.token_to_kv_pool_allocator
        self.pool_tokens = int(allocator.size)
        self.trees = OpenTrees(int(self.pool_tokens * fraction), int(allocator.page_size))
        self._updates = 0
        self._inserting: Any = None
        """The request that inserts now, else None."""
        self._inserted: tuple[RadixKey, int] | None = None
        self._passed_over: list[int] = []
        # slot numbers start at page_size: slot 0 takes what padding writes
        self._computed_by = torch.zeros(
            self.pool_tokens + int(allocator.page_size) + 1,
            dtype=torch.int32,
            device=allocator.device,
        )
        super().__init__(params)

    # ---- weight versions

    @property
    def weights(self) -> Weights:
        """The weights that the scheduler computes with now."""
        return Weights(get_serving().weight_version, self._updates)

    def weights_changed(self) -> None:
        """Notes an update of the weights; call it after each, whatever its label."""
        self._updates += 1
        self.trees.forget_paths()

    def reset(self) -> None:
        super().reset()
        self.trees.forget_paths()

    def match_prefix(self, params: MatchPrefixParams) -> Any:
        request = params.req
        if request is not None and not request.kv.holds_kv:
            # what it finds and computes from now on belongs to these weights, and if they change
            # under it, to them still: it may not mix with what is computed afresh
            request.ibtree_weights = self.weights
            self.trees.started(request.rid)
        return super().match_prefix(replace(params, key=self._key(params.key, request)))

    def insert(self, params: InsertParams) -> InsertResult:
        request = self._inserting
        params = replace(params, key=self._key(params.key, request))
        result = super().insert(params)
        self._computed_by[params.value] = self._weights_of(request).updates
        if self._inserted is None:
            self._inserted = params.key, result.last_device_node
        return result

    def root_node_handle(self, extra_key: str | None = None) -> int:
        return super().root_node_handle(  # type: ignore[no-any-return]
            self.weights.namespace(extra_key)
        )

    def _weights_of(self, request: Any) -> Weights:
        return getattr(request, "ibtree_weights", None) or self.weights

    def _key(self, key: RadixKey, request: Any = None) -> RadixKey:
        namespace = self._weights_of(request).namespace(key.extra_key)
        return RadixKey(key.token_ids, namespace, key.is_bigram, key.limit, key.cache_salt)

    # ---- requests

    def cache_unfinished_req(self, req: Any, chunked: bool = False, **kwargs: Any) -> None:
        with self._inserts(req):
            super().cache_unfinished_req(req, chunked, **kwargs)

    def insert_req(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        with self._inserts(req):
            super().insert_req(req, up_to=up_to, **kwargs)
        if self._inserted and self._weights_of(req) == self.weights:
            key, node = self._inserted  # of the whole path; a second insert only splits it
            path = Key(key.raw_token_ids(), (key.extra_key, key.cache_salt))
            prompt_tokens = len(req.origin_input_ids)
            self.trees.finished(req.rid, path, prompt_tokens, req.cached_tokens, node)

    @contextmanager
    def _inserts(self, request: Any) -> Iterator[None]:
        self._inserting, self._inserted = request, None
        try:
            yield
        finally:
            self._inserting = None

    # ---- eviction

    def _evict_components(
        self, request_by_type: Any, tracker: Any, available_size_targets: Any = None
    ) -> None:
        super()._evict_components(request_by_type, tracker, available_size_targets)
        while self._passed_over and self._short(request_by_type, tracker, available_size_targets):
            if not self.trees.expose_oldest():
                break
            super()._evict_components(request_by_type, tracker, available_size_targets)
        self.trees.restore()
        for node in self._passed_over:
            if self.trees.protects(node):
                self._touch(self.trees.key_of(node))
        self._passed_over.clear()

    def _evict_device_next_node(self, component_type: Any, tracker: Any) -> tuple[int | None, bool]:
        while True:
            node, progress = super()._evict_device_next_node(component_type, tracker)
            if node is None or not self.trees.protects(node):
                return node, progress
            self._passed_over.append(node)

    def _evict_device_leaf(self, node_id: int, tracker: Any) -> Any:
        backup = super()._evict_device_leaf(node_id, tracker)
        for path in self.trees.evicted(node_id):
            left, end, _ = self.tree_core.match_full_device_prefix(_radix_key(path.key))
            self.trees.shortened(path, left, end)
        return backup

    def _short(self, request_by_type: Any, tracker: Any, targets: Any) -> bool:
        """Whether a walk ended before it found what it was asked for."""

        def missing(component: Any) -> bool:
            if tracker[component] >= request_by_type[component]:
                return False
            kind, size = (targets or {}).get(component, (component, None))
            return size is None or self._component_available_size(kind) < size

        return any(missing(component) for component in self.tree_components)

    def _touch(self, key: Key) -> None:
        """Makes the path the most recently used one."""
        result = self.tree_core.match_prefix(MatchPrefixParams(key=_radix_key(key)))
        self._apply_cache_actions(result.cache_actions)

    # ---- audit

    def probe(self, token_ids: Sequence[int]) -> tuple[int, int]:
        """How many tokens of the prefix are served from the cache, and how many of those were
        computed with other weights than the present ones (must be 0)."""
        key = self._key(RadixKey(array("q", token_ids)))
        slots = super().match_prefix(MatchPrefixParams(key=key)).device_indices
        return len(slots), int((self._computed_by[slots] != self.weights.updates).sum())

    def ranks_agree(self) -> bool:
        """Whether all tensor-parallel ranks took the same decisions; all of them must call it."""
        digest = torch.tensor([self.trees.digest, -self.trees.digest])
        self._all_reduce_attn_groups(digest, torch.distributed.ReduceOp.MAX)
        return int(digest.sum()) == 0


def _radix_key(key: Key) -> RadixKey:
    extra_key, cache_salt = key.namespace
    return RadixKey(key.tokens, extra_key, cache_salt=cache_salt)
