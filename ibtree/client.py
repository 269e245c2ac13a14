"""The gRPC client, synchronous and asynchronous, for anyone who wants trees.

Every call has a deadline; UNAVAILABLE alone is retried (by the channel, within the deadline);
failures are `RpcFailed` with one readable line. Clients are context managers.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, Self

import grpc
import grpc.aio

from ibtree import wire_calls
from ibtree.messages import (
    CacheAudit,
    CacheState,
    Expansion,
    Prompt,
    PushOutcome,
    QueueStats,
    ServedWeights,
    TreeLease,
)
from ibtree.tree import Tree
from ibtree.v1 import (
    cache_pb2,
    cache_pb2_grpc,
    queue_pb2,
    queue_pb2_grpc,
    sampling_pb2_grpc,
    weights_pb2,
    weights_pb2_grpc,
)
from ibtree.weights import WeightManifest

DEFAULT_TARGET = "127.0.0.1:7300"
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_REMEDY = "start ibtpo-server or give its address"
_SERVICES = ("TreeSamplingService", "TreeQueueService", "WeightsService", "CacheService")
_RETRY = {
    "maxAttempts": 5,
    "initialBackoff": "0.2s",
    "maxBackoff": "3s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
_CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    (
        "grpc.service_config",
        json.dumps(
            {
                "methodConfig": [
                    {
                        "name": [{"service": f"ibtree.v1.{s}"} for s in _SERVICES],
                        "retryPolicy": _RETRY,
                    }
                ]
            }
        ),
    ),
]


class RpcFailed(RuntimeError):
    """A call failed: `code` is the gRPC status; the message says what and where in one line."""

    def __init__(self, method: str, target: str, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{method} at {target}: {code.name}: {details}")
        self.code, self.details = code, details


def _failed(method: str, target: str, error: grpc.RpcError) -> NoReturn:
    code, details = error.code(), error.details() or "no details"
    if code is grpc.StatusCode.UNAVAILABLE and "connect" in details.lower():
        details = f"no server answers there; {_REMEDY}"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and details == "Deadline Exceeded":
        details = f"no answer in time; {_REMEDY}"
    raise RpcFailed(method, target, code, details) from error


class Client:
    """Synchronous client. Times are seconds; `wait` lets a call wait for the server to come up."""

    def __init__(self, target: str = DEFAULT_TARGET, *, timeout_s: float = 60.0) -> None:
        self.target, self.timeout_s = target, timeout_s
        self._channel = grpc.insecure_channel(target, options=_CHANNEL_OPTIONS)
        self._sampling = sampling_pb2_grpc.TreeSamplingServiceStub(self._channel)
        self._queue = queue_pb2_grpc.TreeQueueServiceStub(self._channel)
        self._weights = weights_pb2_grpc.WeightsServiceStub(self._channel)
        self._cache = cache_pb2_grpc.CacheServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def _call(
        self, method: Any, request: Any, timeout_s: float | None = None, wait: bool = False
    ) -> Any:
        try:
            return method(request, timeout=timeout_s or self.timeout_s, wait_for_ready=wait)
        except grpc.RpcError as error:
            _failed(method._method.decode().rsplit("/", 1)[-1], self.target, error)

    def sample_events(
        self, prompt: Prompt, *, include_text: bool = False, timeout_s: float = 600.0
    ) -> Iterator[Expansion | Tree]:
        """Grows one tree: an Expansion per finished rollout, at last the Tree. `include_text` asks
        for the expansions' `text` and the tree's `texts`."""
        request = wire_calls.sample_request(prompt, include_text)
        call = self._sampling.SampleTree(request, timeout=timeout_s)
        try:
            for message in call:
                yield wire_calls.event_from_proto(message)
        except grpc.RpcError as error:
            _failed("SampleTree", self.target, error)
        finally:
            call.cancel()  # type: ignore[no-untyped-call]

    def sample_tree(
        self, prompt: Prompt, *, include_text: bool = False, timeout_s: float = 600.0
    ) -> Tree:
        """Grows one tree and returns it; with its `texts` if `include_text`."""
        for event in self.sample_events(prompt, include_text=include_text, timeout_s=timeout_s):
            if isinstance(event, Tree):
                return event
        raise RpcFailed("SampleTree", self.target, grpc.StatusCode.INTERNAL, "ended without a tree")

    def submit_prompts(self, prompts: Iterable[Prompt], *, wait: bool = False) -> tuple[int, int]:
        """Queues prompts; returns how many are new and how many were known already."""
        response = self._call(
            self._sampling.SubmitPrompts, wire_calls.submit_request(prompts), wait=wait
        )
        return response.accepted, response.known

    def lease_trees(
        self,
        max_trees: int,
        *,
        lease_s: float | None = None,
        wait_s: float = 0.0,
        wait: bool = False,
    ) -> list[TreeLease]:
        """Leases up to `max_trees` scored trees; empty if none came within `wait_s`."""
        request = queue_pb2.LeaseTreesRequest(max_trees=max_trees, lease_s=lease_s, wait_s=wait_s)
        timeout_s = self.timeout_s + wait_s
        return wire_calls.leases_from_proto(
            self._call(self._queue.LeaseTrees, request, timeout_s, wait)
        )

    def extend_lease(self, lease_ids: Iterable[str], *, lease_s: float | None = None) -> None:
        request = queue_pb2.ExtendLeaseRequest(lease_ids=lease_ids, lease_s=lease_s)
        self._call(self._queue.ExtendLease, request)

    def ack_trees(self, lease_ids: Iterable[str], *, wait: bool = False) -> None:
        self._call(self._queue.AckTrees, queue_pb2.AckTreesRequest(lease_ids=lease_ids), wait=wait)

    def nack_trees(self, lease_ids: Iterable[str], reason: str = "") -> None:
        request = queue_pb2.NackTreesRequest(lease_ids=lease_ids, reason=reason)
        self._call(self._queue.NackTrees, request)

    def queue_stats(self) -> QueueStats:
        request = queue_pb2.GetQueueStatsRequest()
        return wire_calls.stats_from_proto(self._call(self._queue.GetQueueStats, request))

    def get_weights(self, *, timeout_s: float | None = None, wait: bool = False) -> ServedWeights:
        request = weights_pb2.GetWeightsRequest()
        return wire_calls.served_from_proto(
            self._call(self._weights.GetWeights, request, timeout_s, wait)
        )

    def push_weights(
        self, manifest: WeightManifest, path: Path, *, timeout_s: float = 600.0, wait: bool = False
    ) -> PushOutcome:
        """Pushes a version held in a safetensors file; returns when it serves."""
        parts = wire_calls.push_parts(manifest, path)
        return wire_calls.pushed_from_proto(
            self._call(self._weights.PushWeights, parts, timeout_s, wait)
        )

    def cache_state(self) -> CacheState:
        request = cache_pb2.GetCacheRequest()
        return wire_calls.cache_from_proto(self._call(self._cache.GetCache, request))

    def audit_cache(self, samples: int = 32, *, timeout_s: float = 600.0) -> CacheAudit:
        """Compares cached prefixes of open trees with computed ones."""
        request = cache_pb2.AuditCacheRequest(samples=samples)
        return wire_calls.audit_from_proto(self._call(self._cache.AuditCache, request, timeout_s))


class AsyncClient:
    """Asynchronous client; the same calls as Client. Use inside one running event loop."""

    def __init__(self, target: str = DEFAULT_TARGET, *, timeout_s: float = 60.0) -> None:
        self.target, self.timeout_s = target, timeout_s
        self._channel = grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS)
        self._sampling = sampling_pb2_grpc.TreeSamplingServiceStub(self._channel)
        self._queue = queue_pb2_grpc.TreeQueueServiceStub(self._channel)
        self._weights = weights_pb2_grpc.WeightsServiceStub(self._channel)
        self._cache = cache_pb2_grpc.CacheServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close(None)

    async def _call(
        self, method: Any, request: Any, timeout_s: float | None = None, wait: bool = False
    ) -> Any:
        try:
            return await method(request, timeout=timeout_s or self.timeout_s, wait_for_ready=wait)
        except grpc.RpcError as error:
            _failed(method._method.decode().rsplit("/", 1)[-1], self.target, error)

    async def sample_events(
        self, prompt: Prompt, *, include_text: bool = False, timeout_s: float = 600.0
    ) -> AsyncIterator[Expansion | Tree]:
        """Grows one tree: an Expansion per finished rollout, at last the Tree. `include_text` asks
        for the expansions' `text` and the tree's `texts`."""
        request = wire_calls.sample_request(prompt, include_text)
        call = self._sampling.SampleTree(request, timeout=timeout_s)
        try:
            async for message in call:
                yield wire_calls.event_from_proto(message)
        except grpc.RpcError as error:
            _failed("SampleTree", self.target, error)
        finally:
            call.cancel()

    async def sample_tree(
        self, prompt: Prompt, *, include_text: bool = False, timeout_s: float = 600.0
    ) -> Tree:
        """Grows one tree and returns it; with its `texts` if `include_text`."""
        async for event in self.sample_events(
            prompt, include_text=include_text, timeout_s=timeout_s
        ):
            if isinstance(event, Tree):
                return event
        raise RpcFailed("SampleTree", self.target, grpc.StatusCode.INTERNAL, "ended without a tree")

    async def submit_prompts(
        self, prompts: Iterable[Prompt], *, wait: bool = False
    ) -> tuple[int, int]:
        """Queues prompts; returns how many are new and how many were known already."""
        response = await self._call(
            self._sampling.SubmitPrompts, wire_calls.submit_request(prompts), wait=wait
        )
        return response.accepted, response.known

    async def lease_trees(
        self,
        max_trees: int,
        *,
        lease_s: float | None = None,
        wait_s: float = 0.0,
        wait: bool = False,
    ) -> list[TreeLease]:
        """Leases up to `max_trees` scored trees; empty if none came within `wait_s`."""
        request = queue_pb2.LeaseTreesRequest(max_trees=max_trees, lease_s=lease_s, wait_s=wait_s)
        timeout_s = self.timeout_s + wait_s
        return wire_calls.leases_from_proto(
            await self._call(self._queue.LeaseTrees, request, timeout_s, wait)
        )

    async def extend_lease(self, lease_ids: Iterable[str], *, lease_s: float | None = None) -> None:
        request = queue_pb2.ExtendLeaseRequest(lease_ids=lease_ids, lease_s=lease_s)
        await self._call(self._queue.ExtendLease, request)

    async def ack_trees(self, lease_ids: Iterable[str], *, wait: bool = False) -> None:
        request = queue_pb2.AckTreesRequest(lease_ids=lease_ids)
        await self._call(self._queue.AckTrees, request, wait=wait)

    async def nack_trees(self, lease_ids: Iterable[str], reason: str = "") -> None:
        request = queue_pb2.NackTreesRequest(lease_ids=lease_ids, reason=reason)
        await self._call(self._queue.NackTrees, request)

    async def queue_stats(self) -> QueueStats:
        request = queue_pb2.GetQueueStatsRequest()
        return wire_calls.stats_from_proto(await self._call(self._queue.GetQueueStats, request))

    async def get_weights(
        self, *, timeout_s: float | None = None, wait: bool = False
    ) -> ServedWeights:
        request = weights_pb2.GetWeightsRequest()
        return wire_calls.served_from_proto(
            await self._call(self._weights.GetWeights, request, timeout_s, wait)
        )

    async def push_weights(
        self, manifest: WeightManifest, path: Path, *, timeout_s: float = 600.0, wait: bool = False
    ) -> PushOutcome:
        """Pushes a version held in a safetensors file; returns when it serves."""
        parts = wire_calls.push_parts(manifest, path)
        return wire_calls.pushed_from_proto(
            await self._call(self._weights.PushWeights, parts, timeout_s, wait)
        )

    async def cache_state(self) -> CacheState:
        request = cache_pb2.GetCacheRequest()
        return wire_calls.cache_from_proto(await self._call(self._cache.GetCache, request))

    async def audit_cache(self, samples: int = 32, *, timeout_s: float = 600.0) -> CacheAudit:
        """Compares cached prefixes of open trees with computed ones."""
        request = cache_pb2.AuditCacheRequest(samples=samples)
        return wire_calls.audit_from_proto(
            await self._call(self._cache.AuditCache, request, timeout_s)
        )
