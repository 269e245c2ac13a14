"""The gRPC client, synchronous and asynchronous, for anyone who wants trees.

Every call has a deadline. Within it UNAVAILABLE is retried by the channel, and a server that is
too busy is asked again when it said; other failures are `RpcFailed` with one readable line. Clients
are context managers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

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
    RollbackOutcome,
    ServedWeights,
    TreeLease,
)
from ibtree.rpc import CHANNEL_OPTIONS, DEFAULT_TARGET, Deadline, RpcFailed, failure
from ibtree.tree import Tree
from ibtree.v1 import (
    cache_pb2,
    cache_pb2_grpc,
    queue_pb2,
    queue_pb2_grpc,
    sampling_pb2,
    sampling_pb2_grpc,
    weights_pb2,
    weights_pb2_grpc,
)
from ibtree.weight_push import Exchange, Resumption
from ibtree.weights import WeightManifest

__all__ = ["DEFAULT_TARGET", "AsyncClient", "Client", "RpcFailed"]


class Client:
    """Synchronous client. Times are seconds; `wait` lets a call wait for the server to come up."""

    def __init__(self, target: str = DEFAULT_TARGET, *, timeout_s: float = 60.0) -> None:
        self.target, self.timeout_s = target, timeout_s
        self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
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
        deadline = Deadline(timeout_s or self.timeout_s)
        while True:
            try:
                return method(request, timeout=deadline.left_s, wait_for_ready=wait)
            except grpc.RpcError as error:
                name = method._method.decode().rsplit("/", 1)[-1]
                time.sleep(deadline.pause_s(failure(name, self.target, error)))

    def sample_events(
        self, prompt: Prompt, *, include_text: bool = False, timeout_s: float = 600.0
    ) -> Iterator[Expansion | Tree]:
        """Grows one tree: an Expansion per finished rollout, at last the Tree. `include_text` asks
        for the expansions' `text` and the tree's `texts`."""
        return self._sample(wire_calls.sample_request(prompt, include_text), timeout_s)

    def _sample(
        self, request: sampling_pb2.SampleTreeRequest, timeout_s: float
    ) -> Iterator[Expansion | Tree]:
        deadline = Deadline(timeout_s)
        while True:
            call = self._sampling.SampleTree(request, timeout=deadline.left_s)
            try:
                for message in call:
                    yield wire_calls.event_from_proto(message)
                return
            except grpc.RpcError as error:
                pause_s = deadline.pause_s(failure("SampleTree", self.target, error))
            finally:
                call.cancel()  # type: ignore[no-untyped-call]
            time.sleep(pause_s)

    def sample_tree(
        self, prompt: Prompt, *, include_text: bool = False, timeout_s: float = 600.0
    ) -> Tree:
        """Grows one tree and returns it; with its `texts` if `include_text`."""
        request = wire_calls.sample_request(prompt, include_text, tree_only=True)
        for event in self._sample(request, timeout_s):
            if isinstance(event, Tree):
                return event
        raise RpcFailed("SampleTree", self.target, grpc.StatusCode.INTERNAL, "ended without a tree")

    def submit_prompts(
        self, prompts: Iterable[Prompt], *, timeout_s: float | None = None, wait: bool = False
    ) -> tuple[int, int]:
        """Queues prompts; returns how many are new and how many were known already."""
        request = wire_calls.submit_request(prompts)
        response = self._call(self._sampling.SubmitPrompts, request, timeout_s, wait)
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
        self,
        manifest: WeightManifest,
        path: Path,
        *,
        shared_path: str = "",
        timeout_s: float = 600.0,
        wait: bool = False,
    ) -> PushOutcome:
        """Pushes a version held in a safetensors file; returns when it serves. A stream that breaks
        goes on where it stopped. `shared_path`: where the server finds the file in its shared
        folder; nothing is sent then."""
        deadline, resumption = Deadline(timeout_s), Resumption()
        while True:
            exchange = Exchange(manifest, path, shared_path)
            call = self._weights.PushWeights(
                exchange.requests(), timeout=deadline.left_s, wait_for_ready=wait
            )
            try:
                for message in call:
                    if outcome := exchange.answered(message):
                        return outcome
                raise RpcFailed("PushWeights", self.target, grpc.StatusCode.INTERNAL, "no outcome")
            except grpc.RpcError as error:
                failed = failure("PushWeights", self.target, error)
            finally:
                exchange.close()
                call.cancel()  # type: ignore[no-untyped-call]
            time.sleep(min(resumption.pause_s(failed, exchange.started_at), deadline.left_s))

    def rollback_weights(
        self, to_version: int | None = None, *, timeout_s: float = 600.0
    ) -> RollbackOutcome:
        """Serves a kept version's tensors again under a new number; by default the newest that
        differs from what is served."""
        request = weights_pb2.RollbackWeightsRequest(to_version=to_version)
        return wire_calls.rollback_from_proto(
            self._call(self._weights.RollbackWeights, request, timeout_s)
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
        self._channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
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
        deadline = Deadline(timeout_s or self.timeout_s)
        while True:
            try:
                return await method(request, timeout=deadline.left_s, wait_for_ready=wait)
            except grpc.RpcError as error:
                name = method._method.decode().rsplit("/", 1)[-1]
                await asyncio.sleep(deadline.pause_s(failure(name, self.target, error)))

    def sample_events(
        self, prompt: Prompt, *, include_text: bool = False, timeout_s: float = 600.0
    ) -> AsyncIterator[Expansion | Tree]:
        """Grows one tree: an Expansion per finished rollout, at last the Tree. `include_text` asks
        for the expansions' `text` and the tree's `texts`."""
        return self._sample(wire_calls.sample_request(prompt, include_text), timeout_s)

    async def _sample(
        self, request: sampling_pb2.SampleTreeRequest, timeout_s: float
    ) -> AsyncIterator[Expansion | Tree]:
        deadline = Deadline(timeout_s)
        while True:
            call = self._sampling.SampleTree(request, timeout=deadline.left_s)
            try:
                async for message in call:
                    yield wire_calls.event_from_proto(message)
                return
            except grpc.RpcError as error:
                pause_s = deadline.pause_s(failure("SampleTree", self.target, error))
            finally:
                call.cancel()
            await asyncio.sleep(pause_s)

    async def sample_tree(
        self, prompt: Prompt, *, include_text: bool = False, timeout_s: float = 600.0
    ) -> Tree:
        """Grows one tree and returns it; with its `texts` if `include_text`."""
        request = wire_calls.sample_request(prompt, include_text, tree_only=True)
        async for event in self._sample(request, timeout_s):
            if isinstance(event, Tree):
                return event
        raise RpcFailed("SampleTree", self.target, grpc.StatusCode.INTERNAL, "ended without a tree")

    async def submit_prompts(
        self, prompts: Iterable[Prompt], *, timeout_s: float | None = None, wait: bool = False
    ) -> tuple[int, int]:
        """Queues prompts; returns how many are new and how many were known already."""
        request = wire_calls.submit_request(prompts)
        response = await self._call(self._sampling.SubmitPrompts, request, timeout_s, wait)
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
        self,
        manifest: WeightManifest,
        path: Path,
        *,
        shared_path: str = "",
        timeout_s: float = 600.0,
        wait: bool = False,
    ) -> PushOutcome:
        """Pushes a version held in a safetensors file; returns when it serves. A stream that breaks
        goes on where it stopped. `shared_path`: where the server finds the file in its shared
        folder; nothing is sent then."""
        with Client(self.target) as client:  # closed when this call is cancelled: so is the push
            push = partial(client.push_weights, shared_path=shared_path, wait=wait)
            return await asyncio.to_thread(push, manifest, path, timeout_s=timeout_s)

    async def rollback_weights(
        self, to_version: int | None = None, *, timeout_s: float = 600.0
    ) -> RollbackOutcome:
        """Serves a kept version's tensors again under a new number; by default the newest that
        differs from what is served."""
        request = weights_pb2.RollbackWeightsRequest(to_version=to_version)
        return wire_calls.rollback_from_proto(
            await self._call(self._weights.RollbackWeights, request, timeout_s)
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
