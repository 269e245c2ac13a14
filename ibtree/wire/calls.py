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
    TreeChoice,
    TreeEntry,
    TreeLease,
)
from ibtree.tree import Tree
from ibtree.wire import messages, queue
from ibtree.wire.v1 import cache_pb2, queue_pb2, reward_pb2, sampling_pb2, weights_pb2

R = TypeVar("R")
_FRAME_BYTES = 6
"""Most bytes of a field's number and length around a message."""
MESSAGE_BYTES = 4 * 1024 * 1024
"""Most bytes of a message."""
LARGE_BYTES = 16 * 1024 * 1024
"""Most bytes of a request with many prompts, and of a message of a push."""
MOST_PROMPTS = 10_000
"""Prompts of one SubmitPrompts request."""


@dataclass(frozen=True)
class Method:
    """A method of a service: its names, the protobuf classes of its messages, and the most bytes
    that a request may have."""

    service: str
    name: str
    request: Any
    response: Any
    most_bytes: int

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


def _method(service: str, module: Any, name: str, most_bytes: int = MESSAGE_BYTES) -> Method:
    request, response = getattr(module, f"{name}Request"), getattr(module, f"{name}Response")
    return Method(service, name, request, response, most_bytes)


SAMPLE_TREE = _method("TreeSamplingService", sampling_pb2, "SampleTree")
CANCEL_TREE = _method("TreeSamplingService", sampling_pb2, "CancelTree")
SUBMIT_PROMPTS = _method("TreeSamplingService", sampling_pb2, "SubmitPrompts", LARGE_BYTES)
LEASE_TREES = _method("TreeQueueService", queue_pb2, "LeaseTrees")
EXTEND_LEASE = _method("TreeQueueService", queue_pb2, "ExtendLease")
ACK_TREES = _method("TreeQueueService", queue_pb2, "AckTrees")
NACK_TREES = _method("TreeQueueService", queue_pb2, "NackTrees")
READ_TREE = _method("TreeQueueService", queue_pb2, "ReadTree")
LIST_TREES = _method("TreeQueueService", queue_pb2, "ListTrees")
REVIVE_TREES = _method("TreeQueueService", queue_pb2, "ReviveTrees")
PURGE_TREES = _method("TreeQueueService", queue_pb2, "PurgeTrees")
CANCEL_PROMPTS = _method("TreeQueueService", queue_pb2, "CancelPrompts")
GET_QUEUE_STATS = _method("TreeQueueService", queue_pb2, "GetQueueStats")
PAUSE_QUEUE = _method("TreeQueueService", queue_pb2, "PauseQueue")
RESUME_QUEUE = _method("TreeQueueService", queue_pb2, "ResumeQueue")
DRAIN_QUEUE = _method("TreeQueueService", queue_pb2, "DrainQueue")
PUSH_WEIGHTS = _method("WeightsService", weights_pb2, "PushWeights", LARGE_BYTES)
GET_WEIGHTS = _method("WeightsService", weights_pb2, "GetWeights")
ROLLBACK_WEIGHTS = _method("WeightsService", weights_pb2, "RollbackWeights")
ABORT_PUSHES = _method("WeightsService", weights_pb2, "AbortPushes")
GET_CACHE = _method("CacheService", cache_pb2, "GetCache")
AUDIT_CACHE = _method("CacheService", cache_pb2, "AuditCache")
GRADE = _method("RewardService", reward_pb2, "Grade")

METHODS = (
    *(SAMPLE_TREE, CANCEL_TREE, SUBMIT_PROMPTS),
    *(LEASE_TREES, EXTEND_LEASE, ACK_TREES, NACK_TREES, GET_QUEUE_STATS),
    *(PUSH_WEIGHTS, GET_WEIGHTS, ROLLBACK_WEIGHTS),
    *(GET_CACHE, AUDIT_CACHE),
)
"""Those of an ibtpo-server."""
SERVICES = ("TreeSamplingService", "TreeQueueService", "WeightsService", "CacheService")
"""The services of an ibtpo-server; RewardService is the user's own."""


def sample_tree(
    prompt: Prompt, include_text: bool, tree_only: bool, call_id: str = ""
) -> Call[Expansion | Progress | Tree | bytes]:
    """bytes: a part of the tree (parts.py). `call_id`: names it over its attempts."""
    request = sampling_pb2.SampleTreeRequest(
        prompt=messages.prompt_to_proto(prompt),
        include_text=include_text,
        tree_only=tree_only,
        call_id=call_id,
    )
    return Call(SAMPLE_TREE, request, messages.event_from_proto)


def cancel_tree(call_id: str) -> Call[None]:
    return Call(CANCEL_TREE, sampling_pb2.CancelTreeRequest(call_id=call_id), _nothing)


def submit_prompts(prompts: Iterable[Prompt]) -> Iterator[Call[tuple[int, int]]]:
    """As many calls as the prompts take, at least one."""
    for part in _parts(map(messages.prompt_to_proto, prompts)):
        request = sampling_pb2.SubmitPromptsRequest(prompts=part)
        yield Call(SUBMIT_PROMPTS, request, messages.submitted_from_proto)


def _parts(prompts: Iterable[sampling_pb2.Prompt]) -> Iterator[list[sampling_pb2.Prompt]]:
    """Prompts that fit into a request together, in order. One that fits into none goes alone, for
    the server to refuse."""
    part: list[sampling_pb2.Prompt] = []
    size = 0
    for prompt in prompts:
        more = prompt.ByteSize() + _FRAME_BYTES
        if part and (len(part) == MOST_PROMPTS or size + more > LARGE_BYTES):
            yield part
            part, size = [], 0
        part.append(prompt)
        size += more
    yield part


def lease_trees(
    max_trees: int, lease_s: float | None, wait_s: float, run: str | None
) -> Call[list[TreeLease]]:
    """A tree too large for the response has `unread_bytes`: `read_tree` gets them."""
    request = queue_pb2.LeaseTreesRequest(
        max_trees=max_trees, lease_s=lease_s, wait_s=wait_s, run=run
    )
    return Call(LEASE_TREES, request, messages.leases_from_proto)


def read_tree(lease_id: str, start: int) -> Call[bytes]:
    request = queue_pb2.ReadTreeRequest(lease_id=lease_id, start=start)
    return Call(READ_TREE, request, lambda m: m.data)


def extend_lease(lease_ids: Iterable[str], lease_s: float | None) -> Call[None]:
    request = queue_pb2.ExtendLeaseRequest(lease_ids=lease_ids, lease_s=lease_s)
    return Call(EXTEND_LEASE, request, _nothing)


def ack_trees(lease_ids: Iterable[str]) -> Call[None]:
    return Call(ACK_TREES, queue_pb2.AckTreesRequest(lease_ids=lease_ids), _nothing)


def nack_trees(lease_ids: Iterable[str], reason: str, bad: bool) -> Call[None]:
    request = queue_pb2.NackTreesRequest(lease_ids=lease_ids, reason=reason, bad=bad)
    return Call(NACK_TREES, request, _nothing)


def queue_stats(run: str | None) -> Call[QueueStats]:
    request = queue_pb2.GetQueueStatsRequest(run=run)
    return Call(GET_QUEUE_STATS, request, messages.stats_from_proto)


def list_trees(
    state: str | None, run: str | None, after: int, max_trees: int
) -> Call[tuple[list[TreeEntry], bool]]:
    request = queue_pb2.ListTreesRequest(
        state=queue.state_to_proto(state), run=run, after=after, max_trees=max_trees
    )
    return Call(LIST_TREES, request, queue.entries_from_proto)


def revive_trees(choice: TreeChoice) -> Call[int]:
    request = queue_pb2.ReviveTreesRequest(trees=queue.choice_to_proto(choice))
    return Call(REVIVE_TREES, request, lambda m: m.revived)


def purge_trees(choice: TreeChoice, state: str) -> Call[int]:
    request = queue_pb2.PurgeTreesRequest(
        trees=queue.choice_to_proto(choice), state=queue.state_to_proto(state)
    )
    return Call(PURGE_TREES, request, lambda m: m.purged)


def cancel_prompts(choice: TreeChoice) -> Call[int]:
    request = queue_pb2.CancelPromptsRequest(prompts=queue.choice_to_proto(choice))
    return Call(CANCEL_PROMPTS, request, lambda m: m.cancelled)


def pause_queue(reason: str) -> Call[int]:
    return Call(PAUSE_QUEUE, queue_pb2.PauseQueueRequest(reason=reason), lambda m: m.growing)


def resume_queue() -> Call[tuple[str, ...]]:
    return Call(RESUME_QUEUE, queue_pb2.ResumeQueueRequest(), lambda m: tuple(m.holds))


def drain_queue(reason: str, wait_s: float) -> Call[int]:
    request = queue_pb2.DrainQueueRequest(reason=reason, wait_s=wait_s)
    return Call(DRAIN_QUEUE, request, lambda m: m.growing)


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
