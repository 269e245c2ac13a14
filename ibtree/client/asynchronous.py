"""The asyncio client: the same calls as the blocking one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import grpc
import grpc.aio

from ibtree.client.blocking import Client
from ibtree.client.channel import CHANNEL_OPTIONS, DEFAULT_TARGET, Deadline, RpcFailed, failure
from ibtree.messages import (
    CacheAudit,
    CacheState,
    Expansion,
    Progress,
    Prompt,
    PushOutcome,
    QueueStats,
    RollbackOutcome,
    ServedWeights,
    TreeLease,
)
from ibtree.tree import Tree
from ibtree.weights.manifest import WeightManifest
from ibtree.wire import calls
from ibtree.wire.calls import Call

R = TypeVar("R")


class AsyncClient:
    """Asyncio client. Use inside one running event loop; times are seconds."""

    def __init__(self, target: str = DEFAULT_TARGET, *, timeout_s: float = 60.0) -> None:
        self.target, self.timeout_s = target, timeout_s
        self._channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close(None)

    async def _unary(self, call: Call[R], timeout_s: float | None = None, wait: bool = False) -> R:
        method = call.method.on(self._channel.unary_unary)
        deadline = Deadline(timeout_s or self.timeout_s)
        while True:
            try:
                response = await method(call.request, timeout=deadline.left_s, wait_for_ready=wait)
                return call.decode(response)
            except grpc.RpcError as error:
                await asyncio.sleep(deadline.pause_s(failure(call.method.name, self.target, error)))

    async def _stream(self, call: Call[R], timeout_s: float) -> AsyncIterator[R]:
        method = call.method.on(self._channel.unary_stream)
        deadline = Deadline(timeout_s)
        while True:
            stream = method(call.request, timeout=deadline.left_s)
            try:
                async for message in stream:
                    yield call.decode(message)
                return
            except grpc.RpcError as error:
                pause_s = deadline.pause_s(failure(call.method.name, self.target, error))
            finally:
                stream.cancel()
            await asyncio.sleep(pause_s)

    def sample_events(
        self, prompt: Prompt, *, include_text: bool = False, timeout_s: float = 600.0
    ) -> AsyncIterator[Expansion | Progress | Tree]:
        """Grows one tree: an Expansion per finished rollout, a Progress in quiet times, at last the
        Tree. `include_text` asks for the expansions' `text` and the tree's `texts`."""
        return self._stream(calls.sample_tree(prompt, include_text, tree_only=False), timeout_s)

    async def sample_tree(
        self, prompt: Prompt, *, include_text: bool = False, timeout_s: float = 600.0
    ) -> Tree:
        """Grows one tree and returns it; with its `texts` if `include_text`."""
        call = calls.sample_tree(prompt, include_text, tree_only=True)
        async for event in self._stream(call, timeout_s):
            if isinstance(event, Tree):
                return event
        raise RpcFailed("SampleTree", self.target, grpc.StatusCode.INTERNAL, "ended without a tree")

    async def submit_prompts(
        self, prompts: Iterable[Prompt], *, timeout_s: float | None = None, wait: bool = False
    ) -> tuple[int, int]:
        """Queues prompts; returns how many are new and how many were known already."""
        return await self._unary(calls.submit_prompts(prompts), timeout_s, wait)

    async def lease_trees(
        self,
        max_trees: int,
        *,
        lease_s: float | None = None,
        wait_s: float = 0.0,
        wait: bool = False,
    ) -> list[TreeLease]:
        """Leases up to `max_trees` scored trees; empty if none came within `wait_s`."""
        call = calls.lease_trees(max_trees, lease_s, wait_s)
        return await self._unary(call, self.timeout_s + wait_s, wait)

    async def extend_lease(self, lease_ids: Iterable[str], *, lease_s: float | None = None) -> None:
        await self._unary(calls.extend_lease(lease_ids, lease_s))

    async def ack_trees(self, lease_ids: Iterable[str], *, wait: bool = False) -> None:
        await self._unary(calls.ack_trees(lease_ids), wait=wait)

    async def nack_trees(self, lease_ids: Iterable[str], reason: str = "") -> None:
        await self._unary(calls.nack_trees(lease_ids, reason))

    async def queue_stats(self) -> QueueStats:
        return await self._unary(calls.queue_stats())

    async def get_weights(
        self, *, timeout_s: float | None = None, wait: bool = False
    ) -> ServedWeights:
        return await self._unary(calls.get_weights(), timeout_s, wait)

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
        return await self._unary(calls.rollback_weights(to_version), timeout_s)

    async def abort_pushes(self, version: int | None = None) -> list[int]:
        """Ends pushes whose bytes are still coming, or those of one version; their versions."""
        return await self._unary(calls.abort_pushes(version))

    async def cache_state(self) -> CacheState:
        return await self._unary(calls.cache_state())

    async def audit_cache(self, samples: int = 32, *, timeout_s: float = 600.0) -> CacheAudit:
        """Compares cached prefixes of open trees with computed ones."""
        return await self._unary(calls.audit_cache(samples), timeout_s)
