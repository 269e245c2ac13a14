"""The asyncio client: the same calls as the blocking one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import grpc
import grpc.aio

from ibtree.client.blocking import Client
from ibtree.client.channel import (
    CHANNEL_OPTIONS,
    DEFAULT_TARGET,
    Attempts,
    RpcFailed,
    decoded,
    decoding,
    failure,
)
from ibtree.client.reading import TreeReading
from ibtree.client.sampling import Sampling
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
    TreeChoice,
    TreeEntry,
    TreeLease,
)
from ibtree.tree import Tree
from ibtree.weights.manifest import WeightManifest
from ibtree.wire import calls
from ibtree.wire.calls import Call

R = TypeVar("R")
_INTERNAL = grpc.StatusCode.INTERNAL
_GOODBYE_S = 1.0
"""Longest wait for the server to hear that nobody wants a tree any more."""


class AsyncClient:
    """Asyncio client. Use inside one running event loop; times are seconds."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout_s: float = 60.0,
        patience_s: float | None = None,
    ) -> None:
        """`timeout_s`: how long a call may take unless it says; `patience_s`: how long of that a
        server that was there may be away (None: all of it)."""
        self.target, self.timeout_s, self.patience_s = target, timeout_s, patience_s
        self._known = False
        """Whether the server has answered before."""
        self._channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close(None)

    async def _unary(self, call: Call[R], timeout_s: float | None = None, wait: bool = False) -> R:
        method = call.method.on(self._channel.unary_unary)
        attempts = self._attempts(timeout_s or self.timeout_s, wait)
        while True:
            try:
                response = await method(call.request, timeout=attempts.left_s, wait_for_ready=wait)
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.pause_s(self._failure(call.method.name, error)))
            else:
                self._known = True
                return decoded(call, self.target, response)

    def _attempts(self, timeout_s: float, wait: bool = False) -> Attempts:
        patience_s = None if wait else self.patience_s
        return Attempts(timeout_s, patience_s, known=self._known or wait)

    def _failure(self, method: str, error: Any) -> RpcFailed:
        failed = failure(method, self.target, error)
        self._known |= failed.answered
        return failed

    async def _sampled(
        self, prompt: Prompt, include_text: bool, tree_only: bool, timeout_s: float
    ) -> AsyncIterator[Expansion | Progress | Tree]:
        sampling = Sampling(prompt, include_text, tree_only)
        name, method = sampling.method.name, sampling.method.on(self._channel.unary_stream)
        attempts = self._attempts(timeout_s)
        try:
            while not sampling.over:
                stream = method(sampling.request(), timeout=attempts.left_s)
                try:
                    async for message in stream:
                        self._known = True
                        attempts.answered()
                        event = decoding(name, self.target, partial(sampling.event, message))
                        if event is not None:
                            yield event
                    if tree := decoding(name, self.target, sampling.last):
                        yield tree
                    elif not sampling.over:
                        raise RpcFailed(name, self.target, _INTERNAL, "ended without a tree")
                except grpc.RpcError as error:
                    if not sampling.over:
                        pause_s = attempts.pause_s(self._failure(name, error))
                        await asyncio.sleep(pause_s)
                finally:
                    stream.cancel()
        except RpcFailed as failed:
            sampling.over = failed.code is not _INTERNAL  # else it sends what is wrong
            raise
        finally:
            if not sampling.over:
                with suppress(RpcFailed, grpc.aio.UsageError):  # the client may be closed already
                    await self._unary(sampling.cancel, _GOODBYE_S)

    def sample_events(
        self, prompt: Prompt, *, include_text: bool = False, timeout_s: float = 600.0
    ) -> AsyncIterator[Expansion | Progress | Tree]:
        """Grows one tree: an Expansion per finished rollout, a Progress in quiet times, at last the
        Tree. `include_text` asks for the expansions' `text` and the tree's `texts`."""
        return self._sampled(prompt, include_text, False, timeout_s)

    async def sample_tree(
        self, prompt: Prompt, *, include_text: bool = False, timeout_s: float = 600.0
    ) -> Tree:
        """Grows one tree and returns it; with its `texts` if `include_text`."""
        *_, tree = [event async for event in self._sampled(prompt, include_text, True, timeout_s)]
        assert isinstance(tree, Tree)
        return tree

    async def submit_prompts(
        self, prompts: Iterable[Prompt], *, timeout_s: float | None = None, wait: bool = False
    ) -> tuple[int, int]:
        """Queues prompts; returns how many are new and how many were known already. More than fit
        into a call (10,000, or 16 MiB) take several, each all or nothing; what is wrong with one is
        told with its number in its call."""
        counts = [await self._unary(c, timeout_s, wait) for c in calls.submit_prompts(prompts)]
        return sum(accepted for accepted, _ in counts), sum(known for _, known in counts)

    async def lease_trees(
        self,
        max_trees: int,
        *,
        lease_s: float | None = None,
        wait_s: float = 0.0,
        wait: bool = False,
        run: str | None = None,
    ) -> list[TreeLease]:
        """Leases up to `max_trees` scored trees, of any run or of one; empty if none came within
        `wait_s`. Those too large for one response are read in parts."""
        call = calls.lease_trees(max_trees, lease_s, wait_s, run)
        leases, failed = [], None
        for lease in await self._unary(call, self.timeout_s + wait_s, wait):
            try:
                leases.append(await self._read(lease) if lease.unread_bytes else lease)
            except RpcFailed as error:  # the others are in hand all the same
                failed = error
        if failed and not leases:
            raise failed
        return leases

    async def _read(self, lease: TreeLease) -> TreeLease:
        reading = TreeReading(lease)
        while not reading.complete:
            try:
                async for data in self._parts(reading.call()):
                    reading.add(data)
                reading.ended(self.target)
            except RpcFailed as error:
                await asyncio.sleep(reading.pause_s(error))
        return reading.lease()

    async def _parts(self, call: Call[bytes]) -> AsyncIterator[bytes]:
        """What one stream sends. Raises RpcFailed."""
        stream = call.method.on(self._channel.unary_stream)(call.request, timeout=self.timeout_s)
        try:
            async for message in stream:
                yield decoded(call, self.target, message)
        except grpc.RpcError as error:
            raise self._failure(call.method.name, error) from error
        finally:
            stream.cancel()

    async def extend_lease(self, lease_ids: Iterable[str], *, lease_s: float | None = None) -> None:
        await self._unary(calls.extend_lease(lease_ids, lease_s))

    async def ack_trees(self, lease_ids: Iterable[str], *, wait: bool = False) -> None:
        await self._unary(calls.ack_trees(lease_ids), wait=wait)

    async def nack_trees(
        self,
        lease_ids: Iterable[str],
        reason: str = "",
        *,
        bad: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """Gives trees back; `bad` says that they themselves are at fault, which counts."""
        await self._unary(calls.nack_trees(lease_ids, reason, bad), timeout_s)

    async def queue_stats(self, run: str | None = None) -> QueueStats:
        """Trees by state, of any run or of one."""
        return await self._unary(calls.queue_stats(run))

    async def list_trees(
        self,
        state: str | None = None,
        run: str | None = None,
        *,
        after: int = 0,
        max_trees: int = 100,
    ) -> tuple[list[TreeEntry], bool]:
        """Trees in the journal in the order of submission, from the number `after` on, and whether
        more follow."""
        return await self._unary(calls.list_trees(state, run, after, max_trees))

    async def revive_trees(self, choice: TreeChoice) -> int:
        """Queues dead prompts again; returns how many."""
        return await self._unary(calls.revive_trees(choice))

    async def purge_trees(self, choice: TreeChoice, state: str = "dead") -> int:
        """Forgets trees that are dead, graded or acked; returns how many."""
        return await self._unary(calls.purge_trees(choice, state))

    async def cancel_prompts(self, choice: TreeChoice) -> int:
        """Forgets prompts that are queued or growing; returns how many."""
        return await self._unary(calls.cancel_prompts(choice))

    async def pause_queue(self, reason: str = "") -> int:
        """As Client.pause_queue."""
        return await self._unary(calls.pause_queue(reason))

    async def resume_queue(self) -> tuple[str, ...]:
        """As Client.resume_queue."""
        return await self._unary(calls.resume_queue())

    async def drain_queue(self, reason: str = "", *, wait_s: float = 0.0) -> int:
        """As Client.drain_queue."""
        return await self._unary(calls.drain_queue(reason, wait_s), self.timeout_s + wait_s)

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
