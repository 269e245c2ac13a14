"""What the server counts, as Prometheus metrics on the web port."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from ibtree.messages import CacheAudit, CacheState
from ibtree.tree import Tree
from server_ext.errors import NoReplyError

_LOOK_EVERY_S = 5.0
_log = logging.getLogger(__name__)


class Metrics:
    """Names begin with `ibtpo_`; units are in the names."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str) -> Counter:
            return Counter(f"ibtpo_{name}", text, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"ibtpo_{name}", text, registry=self.registry)

        self._trees = counter("trees", "Trees that ended, scored")
        self._generated = counter("generated_tokens", "Tokens generated for them")
        self._asked = counter("prefix_tokens", "Prefix tokens sent with their requests")
        self._cached = counter("cached_tokens", "Of those, served from the radix cache")
        self._refilled = counter(
            "refilled_tokens", "Of those, computed again: evicted while the tree was open"
        )
        self._open = gauge("cache_open_trees", "Trees open in the radix cache")
        self._protected = gauge("cache_protected_tokens", "Tokens held for open trees")
        self._capacity = gauge("cache_capacity_tokens", "Most tokens held for open trees")
        self._evicted = gauge("cache_evicted_tokens", "Tokens evicted from open trees, ever")
        self._passes = gauge("prefill_passes", "Prefill passes of the engine since it started")
        self._joined = gauge(
            "joined_requests", "Requests that began with a decode step instead, since then"
        )
        self._agree = gauge("cache_ranks_agree", "1: all ranks took the same decisions")
        self._audits = counter("audits", "Cached prefixes compared with computed ones")
        self._difference = gauge(
            "audit_max_difference_nats", "Largest difference of a log-probability found so far"
        )
        self._stale = counter("audit_stale_tokens", "Cached tokens of other weights found: 0")
        self._worst = 0.0

    def tree(self, tree: Tree) -> None:
        """A tree ended."""
        self._trees.inc()
        self._generated.inc(tree.ledger.generated_tokens)
        self._asked.inc(tree.ledger.prefix_tokens)
        self._cached.inc(tree.ledger.cached_tokens)
        self._refilled.inc(tree.ledger.refilled_tokens)

    def cache(self, state: CacheState) -> None:
        self._open.set(state.open_trees)
        self._protected.set(state.protected_tokens)
        self._capacity.set(state.capacity_tokens)
        self._evicted.set(state.evicted_tokens)
        self._agree.set(state.ranks_agree)
        self._passes.set(state.prefill_passes)
        self._joined.set(state.joined_requests)

    def audit(self, audit: CacheAudit) -> None:
        self._audits.inc(audit.samples)
        self._stale.inc(audit.stale_tokens)
        self._worst = max(self._worst, audit.max_difference)
        self._difference.set(self._worst)

    async def watch(self, state: Callable[[], Awaitable[CacheState]]) -> None:
        """Looks at the cache every few seconds, for ever."""
        while True:
            try:
                self.cache(await state())
            except NoReplyError as error:
                _log.warning("%s", error)
            await asyncio.sleep(_LOOK_EVERY_S)


def serve_metrics(metrics: Metrics, address: str) -> tuple[WSGIServer, int]:
    """A started web server on `address` and the port it took. Raises RuntimeError if in use."""
    host, _, port = address.rpartition(":")
    try:
        server, _ = start_http_server(int(port), host, metrics.registry)
    except OSError as error:
        raise RuntimeError(str(error)) from error
    return server, server.server_port
