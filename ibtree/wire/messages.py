"""What requests and responses hold <-> the nouns of ibtree.messages and ibtree.weights."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ibtree.errors import FieldError
from ibtree.messages import (
    CacheAudit,
    CacheState,
    Chat,
    ChatMessage,
    Expansion,
    KeptWeights,
    Progress,
    Prompt,
    PushOutcome,
    QueueStats,
    RollbackOutcome,
    ServedWeights,
    Submission,
    TreeLease,
)
from ibtree.tree import Finish, Tree
from ibtree.tree.options import TreeOptions
from ibtree.weights.manifest import SENT_BYTES, Canary, TensorSpec, WeightManifest
from ibtree.wire.checks import (
    check_finite,
    check_logprobs,
    check_member,
    check_natural,
    check_numbers,
)
from ibtree.wire.trees import options_from_proto, options_to_proto, tree_from_proto
from ibtree.wire.v1 import cache_pb2, queue_pb2, reward_pb2, sampling_pb2, tree_pb2, weights_pb2

_STATE = "WEIGHT_STATE_"
_TEMPLATE_ARGS = "prompt.chat.template_args"
_MAX_TEMPLATE_ARGS, _MAX_ARG_CHARACTERS = 16, 4096


def prompt_to_proto(prompt: Prompt) -> sampling_pb2.Prompt:
    message = sampling_pb2.Prompt(id=prompt.id, answer=prompt.answer, grader=prompt.grader)
    if isinstance(prompt.content, str):
        message.text = prompt.content
    elif isinstance(prompt.content, Chat):
        turns = [sampling_pb2.ChatMessage(**asdict(turn)) for turn in prompt.content.messages]
        arguments = _arguments_to_json(prompt.content.template_args)
        message.chat.CopyFrom(sampling_pb2.Chat(messages=turns, template_args=arguments))
    else:
        message.token_ids.ids.extend(prompt.content)
    if prompt.options is not None:
        message.options.CopyFrom(options_to_proto(prompt.options))
    return message


def prompt_from_proto(message: sampling_pb2.Prompt, defaults: TreeOptions) -> Prompt:
    """Options left out take `defaults`. Raises FieldError for options that are not allowed."""
    return Prompt(
        content=_content(message),
        id=message.id,
        answer=message.answer,
        grader=message.grader,
        options=options_from_proto(message.options, defaults),
    )


def prompt_from_bytes(data: bytes, defaults: TreeOptions) -> Prompt:
    """The prompt in a serialized one. Raises FieldError as `prompt_from_proto` does."""
    return prompt_from_proto(sampling_pb2.Prompt.FromString(data), defaults)


def _content(message: sampling_pb2.Prompt) -> str | tuple[int, ...] | Chat:
    kind = message.WhichOneof("content")
    if kind == "text":
        return message.text
    if kind == "chat":
        turns = tuple(ChatMessage(turn.role, turn.content) for turn in message.chat.messages)
        return Chat(turns, _arguments_from_json(message.chat.template_args))
    return tuple(message.token_ids.ids)


def _arguments_to_json(arguments: Mapping[str, Any]) -> dict[str, str]:
    return {name: json.dumps(_scalar(name, value)) for name, value in arguments.items()}


def _arguments_from_json(encoded: Mapping[str, str]) -> dict[str, Any]:
    """Raises FieldError for too many arguments, and for one that is no JSON scalar."""
    if len(encoded) > _MAX_TEMPLATE_ARGS:
        raise FieldError(_TEMPLATE_ARGS, f"got {len(encoded)}", f"at most {_MAX_TEMPLATE_ARGS}")
    return {name: _scalar(name, _decoded(name, text)) for name, text in sorted(encoded.items())}


def _decoded(name: str, text: str) -> Any:
    if len(text) > _MAX_ARG_CHARACTERS:
        problem = f"{name!r} has {len(text)} characters"
        raise FieldError(_TEMPLATE_ARGS, problem, f"at most {_MAX_ARG_CHARACTERS}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = f"{name!r} is not JSON: {error}"
        raise FieldError(_TEMPLATE_ARGS, problem, 'JSON values such as true, 3 or "x"') from error


def _scalar(name: str, value: Any) -> Any:
    finite = not isinstance(value, float) or math.isfinite(value)
    if not name or not finite or not isinstance(value, str | bool | int | float):
        problem = f"{name!r} is {value!r}"[:200]
        raise FieldError(_TEMPLATE_ARGS, problem, "a text, a finite number, true or false, by name")
    return value


def expansion_to_proto(event: Expansion) -> sampling_pb2.Expansion:
    values = {f.name: getattr(event, f.name) for f in fields(Expansion) if f.name != "finish"}
    return sampling_pb2.Expansion(
        finish_reason=tree_pb2.FinishReason.ValueType(event.finish), **values
    )


def progress_to_proto(progress: Progress) -> sampling_pb2.Progress:
    return sampling_pb2.Progress(**asdict(progress))


def event_from_proto(
    message: sampling_pb2.SampleTreeResponse,
) -> Expansion | Progress | Tree | bytes:
    """bytes: a part of a tree (parts.py)."""
    if message.WhichOneof("event") == "tree_part":
        return message.tree_part
    if message.HasField("tree"):
        return tree_from_proto(message.tree)
    if message.HasField("progress"):
        return Progress(**_numbers("progress", message.progress, Progress))
    if not message.HasField("expansion"):
        raise FieldError("event", "missing", "an expansion, a tree or a progress")
    expansion = message.expansion
    names = [f.name for f in fields(Expansion) if f.name not in ("finish", "text")]
    numbers = check_numbers("expansion", expansion, names)
    check_finite("expansion.reward", expansion.reward, 0.0, 1.0)
    check_natural("expansion.round", expansion.round, 1)
    check_natural("expansion.trajectories", expansion.trajectories, 1)
    reason = check_member("expansion.finish_reason", int(expansion.finish_reason), Finish)
    return Expansion(finish=Finish(reason), text=expansion.text, **numbers)


def _numbers(field: str, message: Any, noun: Any) -> dict[str, Any]:
    """The noun's fields, all of them numbers of at least 0, from the message. Raises FieldError."""
    return check_numbers(field, message, [f.name for f in fields(noun)])


def submitted_from_proto(message: sampling_pb2.SubmitPromptsResponse) -> tuple[int, int]:
    """Prompts that are new, and that were known."""
    return check_natural("accepted", message.accepted), check_natural("known", message.known)


def grade_request(submissions: Iterable[Submission]) -> reward_pb2.GradeRequest:
    trajectories = [reward_pb2.Trajectory(**asdict(submission)) for submission in submissions]
    return reward_pb2.GradeRequest(trajectories=trajectories)


def rewards_from_proto(response: reward_pb2.GradeResponse, count: int) -> list[float]:
    """Raises ValueError unless they are `count` numbers in [0, 1]."""
    rewards = list(response.rewards)
    if len(rewards) != count:
        raise ValueError(f"{len(rewards)} rewards for {count} trajectories")
    for reward in rewards:
        if not 0.0 <= reward <= 1.0:
            raise ValueError(f"the reward {reward} is not in [0, 1]")
    return rewards


def leases_from_proto(response: queue_pb2.LeaseTreesResponse) -> list[TreeLease]:
    """One broken tree does not take the others down: its lease says what is wrong with it."""
    return [_lease_from_proto(message) for message in response.leases]


def _lease_from_proto(message: queue_pb2.TreeLease) -> TreeLease:
    empty = Tree(prompt=(), tree_id=message.tree_id or message.tree.tree_id)
    if not message.HasField("tree"):
        unread_bytes = message.tree_bytes
        return TreeLease(message.lease_id, empty, message.returns, "", unread_bytes)
    try:
        check_natural("returns", message.returns)
        return TreeLease(message.lease_id, tree_from_proto(message.tree), message.returns)
    except FieldError as error:
        return TreeLease(message.lease_id, empty, message.returns, str(error))


def stats_to_proto(stats: QueueStats) -> queue_pb2.GetQueueStatsResponse:
    return queue_pb2.GetQueueStatsResponse(**asdict(stats))


def stats_from_proto(message: queue_pb2.GetQueueStatsResponse) -> QueueStats:
    counts = [f.name for f in fields(QueueStats) if f.name != "holds"]
    numbers = check_numbers("stats", message, counts)
    return QueueStats(**numbers, holds=tuple(message.holds))


def cache_to_proto(state: CacheState) -> cache_pb2.GetCacheResponse:
    return cache_pb2.GetCacheResponse(**asdict(state))


def cache_from_proto(message: cache_pb2.GetCacheResponse) -> CacheState:
    return CacheState(**_numbers("cache", message, CacheState))


def audit_to_proto(audit: CacheAudit) -> cache_pb2.AuditCacheResponse:
    return cache_pb2.AuditCacheResponse(**asdict(audit))


def audit_from_proto(message: cache_pb2.AuditCacheResponse) -> CacheAudit:
    names = [f.name for f in fields(CacheAudit) if f.name != "max_difference"]
    numbers, difference = check_numbers("audit", message, names), message.max_difference
    if not difference >= 0.0:  # infinite: one of the two was not a number
        raise FieldError("audit.max_difference", f"got {difference}", "at least 0")
    return CacheAudit(max_difference=difference, **numbers)


def manifest_to_proto(manifest: WeightManifest) -> weights_pb2.WeightManifest:
    canary = manifest.canary
    return weights_pb2.WeightManifest(
        version=manifest.version,
        model_id=manifest.model_id,
        file_bytes=manifest.file_bytes,
        base_version=manifest.base_version,
        base_digest=manifest.base_digest,
        canary=weights_pb2.Canary(**asdict(canary)) if canary else None,
        run_id=manifest.run_id,
        take_over=manifest.take_over,
        tensors=[
            weights_pb2.TensorSpec(name=t.name, dtype=t.dtype, shape=t.shape, sha256=t.sha256)
            for t in manifest.tensors
        ],
    )


def manifest_from_proto(m: weights_pb2.WeightManifest) -> WeightManifest:
    """Raises FieldError for a canary whose log-probabilities are none."""
    check_logprobs("manifest.canary.logprobs", m.canary.logprobs)
    canary = Canary(tuple(m.canary.token_ids), tuple(m.canary.logprobs), m.canary.tolerance)
    return WeightManifest(
        version=m.version,
        model_id=m.model_id,
        tensors=tuple(TensorSpec(t.name, t.dtype, tuple(t.shape), t.sha256) for t in m.tensors),
        file_bytes=m.file_bytes,
        base_version=m.base_version if m.HasField("base_version") else None,
        base_digest=m.base_digest,
        canary=canary if m.HasField("canary") else None,
        run_id=m.run_id,
        take_over=m.take_over,
    )


def push_first(manifest: WeightManifest, shared_path: str = "") -> weights_pb2.PushWeightsRequest:
    message = manifest_to_proto(manifest)
    return weights_pb2.PushWeightsRequest(manifest=message, shared_path=shared_path)


def push_chunks(path: Path, start: int) -> Iterator[weights_pb2.PushWeightsRequest]:
    """The file from this byte on, in chunks."""
    with path.open("rb") as file:
        file.seek(start)
        while data := file.read(SENT_BYTES):
            chunk = weights_pb2.WeightChunk(offset=start, data=data, crc32=zlib.crc32(data))
            yield weights_pb2.PushWeightsRequest(chunk=chunk)
            start += len(data)


def state_to_proto(state: str) -> weights_pb2.WeightState.ValueType:
    return weights_pb2.WeightState.Value(_STATE + state.upper())


def _state_from_proto(number: weights_pb2.WeightState.ValueType) -> str:
    if number not in weights_pb2.WeightState.values():
        raise FieldError("state", f"unknown {number}", "a WeightState")
    return weights_pb2.WeightState.Name(number).removeprefix(_STATE).lower()


def kept_to_proto(weights: KeptWeights) -> weights_pb2.KeptWeights:
    return weights_pb2.KeptWeights(
        **{f.name: getattr(weights, f.name) for f in fields(KeptWeights)}
    )


def _kept_from_proto(m: weights_pb2.KeptWeights) -> KeptWeights:
    return KeptWeights(
        version=m.version,
        digest=m.digest,
        **check_numbers("kept", m, ("file_bytes", "served_at_s")),
        base_version=m.base_version if m.HasField("base_version") else None,
        restored_version=m.restored_version if m.HasField("restored_version") else None,
        run_id=m.run_id,
    )


def served_from_proto(m: weights_pb2.GetWeightsResponse) -> ServedWeights:
    return ServedWeights(
        version=m.version,
        digest=m.digest,
        state=_state_from_proto(m.state),
        model_id=m.model_id,
        dtype=m.dtype,
        **check_numbers("weights", m, ("age_s", "pause_s")),
        kept=tuple(_kept_from_proto(weights) for weights in m.kept),
    )


def pushed_to_proto(outcome: PushOutcome) -> weights_pb2.PushWeightsResponse:
    pushed = weights_pb2.PushedWeights(
        version=outcome.version,
        state=state_to_proto(outcome.state),
        digest=outcome.digest,
        pause_s=outcome.pause_s,
    )
    return weights_pb2.PushWeightsResponse(pushed=pushed)


def push_answer(m: weights_pb2.PushWeightsResponse) -> int | PushOutcome:
    """The byte from which on the server wants the file, or what became of the push."""
    if not m.HasField("pushed"):
        return check_natural("send_from", m.send_from)
    pushed = m.pushed
    pause_s = check_finite("pushed.pause_s", pushed.pause_s)
    return PushOutcome(pushed.version, _state_from_proto(pushed.state), pushed.digest, pause_s)


def rollback_from_proto(m: weights_pb2.RollbackWeightsResponse) -> RollbackOutcome:
    pause_s = check_finite("pause_s", m.pause_s)
    return RollbackOutcome(m.version, m.restored_version, m.digest, pause_s)
