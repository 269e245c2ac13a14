"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self, TypeVar

import grpc

from ibtree.client.channel import CHANNEL_OPTIONS, DEFAULT_TARGET, Deadline, RpcFailed, failure
from ibtree.client.push import Exchange, Resumption
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


class Client:
    """Blocking client. Times are seconds; `wait` lets a call wait for the server to come up."""

    def __init__(self, target: str = DEFAULT_TARGET, *, timeout_s: float = 60.0) -> None:
        self.target, self.timeout_s = target, timeout_s
        self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def _unary(self, call: Call[R], timeout_s: float | None = None, wait: bool = False) -> R:
        method = call.method.on(self._channel.unary_unary)
        deadline = Deadline(timeout_s or self.timeout_s)
        while True:
            try:
                response = method(call.request, timeout=deadline.left_s, wait_for_ready=wait)
                return call.decode(response)
            except grpc.RpcError as error:
                time.sleep(deadline.pause_s(failure(call.method.name, self.target, error)))

    def _stream(self, call: Call[R], timeout_s: float) -> Iterator[R]:
        method = call.method.on(self._channel.unary_stream)
        deadline = Deadline(timeout_s)
        while True:
            stream = method(call.request, timeout=deadline.left_s)
            try:
                yield from map(call.decode, stream)
                return
            except grpc.RpcError as error:
                pause_s = deadline.pause_s(failure(call.method.name, self.target, error))
            finally:
                stream.cancel()
            time.sleep(pause_s)

    def sample_events(
        self, prompt: Prompt, *, include_text: bool = False, timeout_s: float = 600.0
    ) -> Iterator[Expansion | Progress | Tree]:
        """Grows one tree: an Expansion per finished rollout, a Progress in quiet times, at last the
        Tree. `include_text` asks for the expansions' `text` and the tree's `texts`."""
        return self._stream(calls.sample_tree(prompt, include_text, tree_only=False), timeout_s)

    def sample_tree(
        self, prompt: Prompt, *, include_text: bool = False, timeout_s: float = 600.0
    ) -> Tree:
        """Grows one tree and returns it; with its `texts` if `include_text`."""
        call = calls.sample_tree(prompt, include_text, tree_only=True)
        for event in self._stream(call, timeout_s):
            if isinstance(event, Tree):
                return event
        raise RpcFailed("SampleTree", self.target, grpc.StatusCode.INTERNAL, "ended without a tree")

    def submit_prompts(
        self, prompts: Iterable[Prompt], *, timeout_s: float | None = None, wait: bool = False
    ) -> tuple[int, int]:
        """Queues prompts; returns how many are new and how many were known already."""
        return self._unary(calls.submit_prompts(prompts), timeout_s, wait)

    def lease_trees(
        self,
        max_trees: int,
        *,
        lease_s: float | None = None,
        wait_s: float = 0.0,
        wait: bool = False,
    ) -> list[TreeLease]:
        """Leases up to `max_trees` scored trees; empty if none came within `wait_s`."""
        call = calls.lease_trees(max_trees, lease_s, wait_s)
        return self._unary(call, self.timeout_s + wait_s, wait)

    def extend_lease(self, lease_ids: Iterable[str], *, lease_s: float | None = None) -> None:
        self._unary(calls.extend_lease(lease_ids, lease_s))

    def ack_trees(self, lease_ids: Iterable[str], *, wait: bool = False) -> None:
        self._unary(calls.ack_trees(lease_ids), wait=wait)

    def nack_trees(self, lease_ids: Iterable[str], reason: str = "") -> None:
        self._unary(calls.nack_trees(lease_ids, reason))

    def queue_stats(self) -> QueueStats:
        return self._unary(calls.queue_stats())

    def get_weights(self, *, timeout_s: float | None = None, wait: bool = False) -> ServedWeights:
        return self._unary(calls.get_weights(), timeout_s, wait)

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
            call = calls.push_weights(exchange.requests())
            stream = call.method.on(self._channel.stream_stream)(
                call.request, timeout=deadline.left_s, wait_for_ready=wait
            )
            try:
                for answer in map(call.decode, stream):
                    if outcome := exchange.answered(answer):
                        return outcome
                raise RpcFailed("PushWeights", self.target, grpc.StatusCode.INTERNAL, "no outcome")
            except grpc.RpcError as error:
                failed = failure("PushWeights", self.target, error)
            finally:
                exchange.close()
                stream.cancel()
            time.sleep(min(resumption.pause_s(failed, exchange.started_at), deadline.left_s))

    def rollback_weights(
        self, to_version: int | None = None, *, timeout_s: float = 600.0
    ) -> RollbackOutcome:
        """Serves a kept version's tensors again under a new number; by default the newest that
        differs from what is served."""
        return self._unary(calls.rollback_weights(to_version), timeout_s)

    def abort_pushes(self, version: int | None = None) -> list[int]:
        """Ends pushes whose bytes are still coming, or those of one version; their versions."""
        return self._unary(calls.abort_pushes(version))

    def cache_state(self) -> CacheState:
        return self._unary(calls.cache_state())

    def audit_cache(self, samples: int = 32, *, timeout_s: float = 600.0) -> CacheAudit:
        """Compares cached prefixes of open trees with computed ones."""
        return self._unary(calls.audit_cache(samples), timeout_s)
