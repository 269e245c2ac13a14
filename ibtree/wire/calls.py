"""The table of calls: what each is named, what it sends, and what its response becomes.

Every client, blocking or not, makes its calls from these; services/ has the other side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

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
    Submission,
    TreeLease,
)
from ibtree.tree import Tree
from ibtree.wire import messages
from ibtree.wire.v1 import cache_pb2, queue_pb2, reward_pb2, sampling_pb2, weights_pb2

R = TypeVar("R")


@dataclass(frozen=True)
class Method:
    """A method of a service: its names, and the protobuf classes of its messages."""

    service: str
    name: str
    request: Any
    response: Any

    @property
    def path(self) -> str:
        return f"/ibtree.v1.{self.service}/{self.name}"

    def on(self, kind: Callable[..., Any]) -> Any:
        """The callable of a channel's method `kind`, such as `channel.unary_unary`."""
        return kind(
            self.path,
            request_serializer=self.request.SerializeToString,
            response_deserializer=self.response.FromString,
        )


@dataclass(frozen=True)
class Call(Generic[R]):
    """One call: `decode` makes a noun of its response, or of each message of its stream."""

    method: Method
    request: Any
    decode: Callable[[Any], R]


def _method(service: str, module: Any, name: str) -> Method:
    return Method(
        service, name, getattr(module, f"{name}Request"), getattr(module, f"{name}Response")
    )


SAMPLE_TREE = _method("TreeSamplingService", sampling_pb2, "SampleTree")
SUBMIT_PROMPTS = _method("TreeSamplingService", sampling_pb2, "SubmitPrompts")
LEASE_TREES = _method("TreeQueueService", queue_pb2, "LeaseTrees")
EXTEND_LEASE = _method("TreeQueueService", queue_pb2, "ExtendLease")
ACK_TREES = _method("TreeQueueService", queue_pb2, "AckTrees")
NACK_TREES = _method("TreeQueueService", queue_pb2, "NackTrees")
GET_QUEUE_STATS = _method("TreeQueueService", queue_pb2, "GetQueueStats")
PUSH_WEIGHTS = _method("WeightsService", weights_pb2, "PushWeights")
GET_WEIGHTS = _method("WeightsService", weights_pb2, "GetWeights")
ROLLBACK_WEIGHTS = _method("WeightsService", weights_pb2, "RollbackWeights")
ABORT_PUSHES = _method("WeightsService", weights_pb2, "AbortPushes")
GET_CACHE = _method("CacheService", cache_pb2, "GetCache")
AUDIT_CACHE = _method("CacheService", cache_pb2, "AuditCache")
GRADE = _method("RewardService", reward_pb2, "Grade")

SERVICES = ("TreeSamplingService", "TreeQueueService", "WeightsService", "CacheService")
"""The services of an ibtpo-server; RewardService is the user's own."""


def sample_tree(
    prompt: Prompt, include_text: bool, tree_only: bool
) -> Call[Expansion | Progress | Tree]:
    request = sampling_pb2.SampleTreeRequest(
        prompt=messages.prompt_to_proto(prompt), include_text=include_text, tree_only=tree_only
    )
    return Call(SAMPLE_TREE, request, messages.event_from_proto)


def submit_prompts(prompts: Iterable[Prompt]) -> Call[tuple[int, int]]:
    request = sampling_pb2.SubmitPromptsRequest(
        prompts=[messages.prompt_to_proto(prompt) for prompt in prompts]
    )
    return Call(SUBMIT_PROMPTS, request, lambda m: (m.accepted, m.known))


def lease_trees(max_trees: int, lease_s: float | None, wait_s: float) -> Call[list[TreeLease]]:
    request = queue_pb2.LeaseTreesRequest(max_trees=max_trees, lease_s=lease_s, wait_s=wait_s)
    return Call(LEASE_TREES, request, messages.leases_from_proto)


def extend_lease(lease_ids: Iterable[str], lease_s: float | None) -> Call[None]:
    request = queue_pb2.ExtendLeaseRequest(lease_ids=lease_ids, lease_s=lease_s)
    return Call(EXTEND_LEASE, request, _nothing)


def ack_trees(lease_ids: Iterable[str]) -> Call[None]:
    return Call(ACK_TREES, queue_pb2.AckTreesRequest(lease_ids=lease_ids), _nothing)


def nack_trees(lease_ids: Iterable[str], reason: str) -> Call[None]:
    request = queue_pb2.NackTreesRequest(lease_ids=lease_ids, reason=reason)
    return Call(NACK_TREES, request, _nothing)


def queue_stats() -> Call[QueueStats]:
    return Call(GET_QUEUE_STATS, queue_pb2.GetQueueStatsRequest(), messages.stats_from_proto)


def push_weights(requests: Iterator[Any]) -> Call[int | PushOutcome]:
    """`requests` are made by messages.push_first and push_chunks, in step with what comes back."""
    return Call(PUSH_WEIGHTS, requests, messages.push_answer)


def get_weights() -> Call[ServedWeights]:
    return Call(GET_WEIGHTS, weights_pb2.GetWeightsRequest(), messages.served_from_proto)


def rollback_weights(to_version: int | None) -> Call[RollbackOutcome]:
    request = weights_pb2.RollbackWeightsRequest(to_version=to_version)
    return Call(ROLLBACK_WEIGHTS, request, messages.rollback_from_proto)


def abort_pushes(version: int | None) -> Call[list[int]]:
    request = weights_pb2.AbortPushesRequest(version=version)
    return Call(ABORT_PUSHES, request, lambda m: list(m.versions))


def cache_state() -> Call[CacheState]:
    return Call(GET_CACHE, cache_pb2.GetCacheRequest(), messages.cache_from_proto)


def audit_cache(samples: int) -> Call[CacheAudit]:
    return Call(
        AUDIT_CACHE, cache_pb2.AuditCacheRequest(samples=samples), messages.audit_from_proto
    )


def grade(submissions: list[Submission]) -> Call[list[float]]:
    """`decode` raises ValueError unless there is one reward in [0, 1] for each submission."""
    return Call(
        GRADE,
        messages.grade_request(submissions),
        lambda m: messages.rewards_from_proto(m, len(submissions)),
    )


def _nothing(_: Any) -> None:
    return None
