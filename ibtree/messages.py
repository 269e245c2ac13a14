"""The nouns of the gRPC calls besides the Tree; ibtree.wire turns them into protobuf and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ibtree.tree import Finish, Tree
from ibtree.tree.options import TreeOptions


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a conversation, for the model's chat template."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """A conversation as a prompt. `template_args`: arguments of the model's chat template by name,
    such as enable_thinking; at most 16."""

    messages: tuple[ChatMessage, ...]
    template_args: Mapping[str, str | bool | int | float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Prompt:
    """A question: text, token ids or a conversation. Empty `id`, `grader` and absent `options` take
    the server's defaults; an empty `answer` is none. `options` may be a mapping of some of them, by
    the names of TreeOptions and SamplingOptions: the others are then the server's defaults."""

    content: str | Sequence[int] | Chat
    id: str = ""
    answer: str = ""
    grader: str = ""
    options: TreeOptions | Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Submission:
    """A finished trajectory as text, special tokens left out; an empty `answer` is none."""

    prompt: str
    completion: str
    answer: str
    tree_id: str = ""


@dataclass(frozen=True)
class Expansion:
    """One finished, graded rollout of a growing tree (fields: Expansion in sampling.proto)."""

    round: int
    start_node: int
    end_node: int
    generated_tokens: int
    reward: float
    finish: Finish
    trajectories: int
    target_trajectories: int
    text: str = ""


@dataclass(frozen=True)
class Progress:
    """What goes on in a growing tree while no rollout ends (fields: Progress in sampling.proto)."""

    rollouts_in_flight: int
    generated_tokens: int
    trajectories: int
    target_trajectories: int
    elapsed_s: float


@dataclass(frozen=True)
class TreeLease:
    """A scored tree in hand until its lease runs out; `returns` counts earlier nacks and losses.

    `problem` says what is wrong with a tree that does not decode; it is then empty but for its id.
    `unread_bytes`: size of a tree too large for the response, which is empty until a client has
    read it. [bytes]
    """

    lease_id: str
    tree: Tree
    returns: int
    problem: str = ""
    unread_bytes: int = 0


@dataclass(frozen=True)
class QueueStats:
    """Trees by state (fields: GetQueueStatsResponse in queue.proto)."""

    queued: int = 0
    growing: int = 0
    graded: int = 0
    leased: int = 0
    acked: int = 0
    dead: int = 0
    interactive: int = 0
    holds: tuple[str, ...] = ()


@dataclass(frozen=True)
class TreeEntry:
    """A tree in a server's journal (fields: TreeEntry in queue.proto); `state` in lower case."""

    number: int
    id: str
    state: str
    failures: int = 0
    interruptions: int = 0
    returns: int = 0
    refusals: int = 0
    reasons: tuple[str, ...] = ()
    tree_bytes: int = 0
    age_s: float = 0.0
    rests_s: float | None = None
    lease_left_s: float | None = None
    version: int | None = None


@dataclass(frozen=True)
class TreeChoice:
    """Which trees are meant: these `ids`, all of one `run`, or `all` there are."""

    ids: tuple[str, ...] = ()
    run: str | None = None
    all: bool = False


@dataclass(frozen=True)
class KeptWeights:
    """A version that can be gone back to (fields: KeptWeights in weights.proto)."""

    version: int
    digest: bytes
    file_bytes: int
    served_at_s: float
    base_version: int | None = None
    restored_version: int | None = None
    run_id: str = ""


@dataclass(frozen=True)
class ServedWeights:
    """The served weight version (fields: GetWeightsResponse in weights.proto)."""

    version: int
    digest: bytes
    state: str
    model_id: str
    dtype: str
    age_s: float = 0.0
    pause_s: float = 0.0
    kept: tuple[KeptWeights, ...] = ()


@dataclass(frozen=True)
class PushOutcome:
    """What became of a pushed version (fields: PushWeightsResponse in weights.proto)."""

    version: int
    state: str
    digest: bytes
    pause_s: float


@dataclass(frozen=True)
class RollbackOutcome:
    """What serves after a rollback (fields: RollbackWeightsResponse in weights.proto)."""

    version: int
    restored_version: int
    digest: bytes
    pause_s: float


@dataclass(frozen=True)
class CacheState:
    """The engine's radix cache and how it is used (fields: GetCacheResponse in cache.proto)."""

    pool_tokens: int = 0
    capacity_tokens: int = 0
    protected_tokens: int = 0
    evicted_tokens: int = 0
    open_trees: int = 0
    ranks_agree: bool = True
    prefill_passes: int = 0
    joined_requests: int = 0


@dataclass(frozen=True)
class CacheAudit:
    """Cached prefixes against computed ones (fields: AuditCacheResponse in cache.proto)."""

    samples: int = 0
    prefix_tokens: int = 0
    cached_tokens: int = 0
    stale_tokens: int = 0
    max_difference: float = 0.0
