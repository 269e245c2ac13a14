"""What the server counts, as Prometheus metrics on the web port.

What only grows while the server runs is a counter (`_total`), what goes up and down is a gauge,
and what is not known now is absent instead of 0.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Iterator
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    make_wsgi_app,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from ibtree.messages import CacheAudit, CacheState
from ibtree.tree import Tree
from server_ext.capacity.shares import Kind
from server_ext.errors import NoReplyError
from server_ext.services.web import serve_web
from server_ext.trees.forest import Outcome

_LOOK_EVERY_S = 5.0
_NATS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, math.inf)
_log = logging.getLogger(__name__)
# a gauge beside each counter, which nobody asks for
disable_created_metrics()  # type: ignore[no-untyped-call]

_GAUGES = {
    "cache_open_trees": ("open_trees", "Trees open in the radix cache"),
    "cache_protected_tokens": ("protected_tokens", "Tokens held for open trees"),
    "cache_capacity_tokens": ("capacity_tokens", "Most tokens held for open trees"),
    "cache_ranks_agree": ("ranks_agree", "1: all ranks took the same decisions; 0: restart it"),
}
_COUNTERS = {
    "cache_evicted_tokens": ("evicted_tokens", "Tokens evicted from open trees"),
    "prefill_passes": ("prefill_passes", "Prefill passes of the engine"),
    "joined_requests": ("joined_requests", "Requests that began with a decode step instead"),
}
"""Metrics of the cache: their fields in CacheState, and what they mean."""


class _Cache:
    """The state of the radix cache, as last seen; nothing while it is unknown: before the first
    look, and when the cache did not answer the last one."""

    def __init__(self) -> None:
        self.state: CacheState | None = None

    def collect(self) -> Iterator[Metric]:
        if self.state is None:
            return
        for name, (field, text) in _GAUGES.items():
            value = float(getattr(self.state, field))
            yield GaugeMetricFamily(f"ibtpo_{name}", text, value=value)
        for name, (field, text) in _COUNTERS.items():
            value = float(getattr(self.state, field))
            yield CounterMetricFamily(f"ibtpo_{name}", text, value=value)


class Metrics:
    """Names begin with `ibtpo_`; units are in the names."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._cache = _Cache()
        self.registry.register(self._cache)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"ibtpo_{name}", text, labels, registry=self.registry)

        self._trees = counter("trees", "Trees that ended", "kind", "outcome")
        for kind in Kind:
            for outcome in Outcome:
                self._trees.labels(kind.value, outcome.value)  # known to be 0
        self._generated = counter("generated_tokens", "Tokens generated for them")
        self._asked = counter("prefix_tokens", "Prefix tokens sent with their requests")
        self._cached = counter("cached_tokens", "Of those, served from the radix cache")
        self._refilled = counter(
            "refilled_tokens", "Of those, computed again: evicted while the tree was open"
        )
        self._audits = counter("audits", "Cached prefixes compared with computed ones")
        self._difference = Histogram(
            "ibtpo_audit_difference_nats",
            "Largest difference of a log-probability in an audit that compared any",
            registry=self.registry,
            buckets=_NATS,
        )
        self._stale = counter("audit_stale_tokens", "Cached tokens of other weights found: 0")

    def tree(self, tree: Tree, kind: Kind, outcome: Outcome) -> None:
        """A tree ended."""
        self._trees.labels(kind.value, outcome.value).inc()
        self._generated.inc(tree.ledger.generated_tokens)
        self._asked.inc(tree.ledger.prefix_tokens)
        self._cached.inc(tree.ledger.cached_tokens)
        self._refilled.inc(tree.ledger.refilled_tokens)

    def cache(self, state: CacheState | None) -> None:
        """What the cache said; None: it did not answer."""
        self._cache.state = state

    def audit(self, audit: CacheAudit) -> None:
        """Cached prefixes were compared."""
        self._audits.inc(audit.samples)
        self._stale.inc(audit.stale_tokens)
        if audit.samples:
            self._difference.observe(audit.max_difference)

    async def watch(self, state: Callable[[], Awaitable[CacheState]]) -> None:
        """Looks at the cache every few seconds, for ever."""
        while True:
            try:
                self.cache(await state())
            except NoReplyError as error:
                _log.warning("%s", error)
                self.cache(None)
            await asyncio.sleep(_LOOK_EVERY_S)


def serve_metrics(metrics: Metrics, address: str) -> tuple[WSGIServer, int]:
    """A started web server on `address` and the port it took. Raises RuntimeError if in use."""
    return serve_web(make_wsgi_app(metrics.registry), address)
