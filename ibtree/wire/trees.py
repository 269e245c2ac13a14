"""Tree and options <-> protobuf. Nothing else knows both (the service files only pass messages)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from itertools import groupby
from typing import Any

import numpy as np

from ibtree.errors import FieldError
from ibtree.tree import Finish, Ledger, Step, StopCause, Tree
from ibtree.tree.options import SamplingOptions, TreeOptions, completed
from ibtree.tree.score import ib_scores
from ibtree.wire.v1 import tree_pb2 as pb

_COUNTS = ("draws", "visits", "starts", "ends")


def options_to_proto(options: TreeOptions | Mapping[str, Any]) -> pb.TreeOptions:
    """Every field of TreeOptions, or those alone that a mapping gives; limits that are None stay
    absent. Raises FieldError for a mapping with a value that is not allowed."""
    whole = completed(options, TreeOptions())
    outer = {f.name for f in fields(TreeOptions)} - {"sampling"}
    inner = {f.name for f in fields(SamplingOptions)}
    if not isinstance(options, TreeOptions):
        outer, inner = outer & options.keys(), inner & options.keys()
    sampling = {name: getattr(whole.sampling, name) for name in inner}
    flat = {name: getattr(whole, name) for name in outer}
    return pb.TreeOptions(sampling=pb.SamplingOptions(**sampling), **flat)


def options_from_proto(message: pb.TreeOptions, defaults: TreeOptions) -> TreeOptions:
    """Absent fields take `defaults`. Raises FieldError for a value that is not allowed."""

    def present(part: Any, names: list[str]) -> dict[str, Any]:
        """Fields that are there; a repeated one that is not empty."""
        there = {descriptor.name: value for descriptor, value in part.ListFields()}
        return {name: there[name] for name in names if name in there}

    outer = [f.name for f in fields(TreeOptions) if f.name != "sampling"]
    inner = [f.name for f in fields(SamplingOptions)]
    values = {name: getattr(defaults, name) for name in outer} | present(message, outer)
    sampling = {name: getattr(defaults.sampling, name) for name in inner}
    values["sampling"] = SamplingOptions(**(sampling | present(message.sampling, inner)))
    return TreeOptions(**values)


def tree_to_proto(tree: Tree, text: Callable[[tuple[int, ...]], str] | None = None) -> pb.Tree:
    """Each node once. Node order is the tree's own, renumbered only where a split broke it.
    `text` decodes a step's ids, for callers who asked for `texts`."""
    grown_in_order = all(p < i for i, p in enumerate(tree.parents[1:], 1)) and all(tree.visits)
    nodes = list(range(len(tree))) if grown_in_order else list(tree.topological())
    index_of = {node: i for i, node in enumerate(nodes)}
    steps = [tree.steps[n] for n in nodes]
    versions = [v for step in steps for v in step.versions]
    spans = [(version, sum(1 for _ in run)) for version, run in groupby(versions)]
    scores = ib_scores(tree)
    return pb.Tree(
        tree_id=tree.tree_id,
        model_id=tree.model_id,
        answer=tree.answer,
        step_unit=tree.step_unit,
        first_round_reward=tree.first_round_reward,
        prompt_token_ids=tree.prompt,
        parents=[index_of[tree.parents[n]] for n in nodes],
        token_offsets=np.cumsum([0] + [len(s.token_ids) for s in steps]).tolist(),
        token_ids=[t for s in steps for t in s.token_ids],
        logprobs=[lp for s in steps for lp in s.logprobs],
        texts=[text(s.token_ids) for s in steps] if text else [],
        reward_sums=[tree.reward_sums[n] for n in nodes],
        ib_scores=[scores[n] for n in nodes],
        finish_reasons=[pb.FinishReason.ValueType(tree.finishes[n]) for n in nodes],
        span_lengths=[length for _, length in spans],
        span_versions=[version for version, _ in spans],
        options=options_to_proto(tree.options),
        stop_cause=pb.StopCause.ValueType(tree.stop_cause),
        ledger=pb.Ledger(
            unique_tokens=tree.unique_tokens,
            **{f.name: getattr(tree.ledger, f.name) for f in fields(Ledger)},
        ),
        **{name: [getattr(tree, name)[n] for n in nodes] for name in _COUNTS},
    )


def tree_to_bytes(tree: Tree) -> bytes:
    """The serialized ibtree.v1.Tree."""
    return tree_to_proto(tree).SerializeToString()


def tree_from_bytes(data: bytes) -> Tree:
    """The Tree that `tree_to_bytes` serialized. Raises FieldError as `tree_from_proto` does."""
    return tree_from_proto(pb.Tree.FromString(data))


def tree_from_proto(message: pb.Tree) -> Tree:
    """Raises FieldError where the columns do not make a tree; then nothing was built."""
    n, tokens = len(message.parents), len(message.token_ids)
    _check_columns(message, n, tokens)
    versions = np.repeat(np.asarray(message.span_versions, np.int64), message.span_lengths).tolist()
    tree = Tree(
        prompt=tuple(message.prompt_token_ids),
        tree_id=message.tree_id,
        model_id=message.model_id,
        answer=message.answer,
        step_unit=message.step_unit,
        first_round_reward=(
            message.first_round_reward if message.HasField("first_round_reward") else None
        ),
        options=options_from_proto(message.options, TreeOptions()),
        stop_cause=StopCause(message.stop_cause),
        ledger=Ledger(**{f.name: getattr(message.ledger, f.name) for f in fields(Ledger)}),
    )
    for i in range(1, n):
        low, high = message.token_offsets[i], message.token_offsets[i + 1]
        ids, logprobs = tuple(message.token_ids[low:high]), tuple(message.logprobs[low:high])
        node = tree.graft(message.parents[i], Step(ids, logprobs, tuple(versions[low:high])))
        if node != i:
            raise FieldError("tree.token_ids", f"node {i} repeats a sibling", "distinct siblings")
    for name in _COUNTS:
        setattr(tree, name, list(getattr(message, name)))
    tree.reward_sums = list(message.reward_sums)
    tree.texts = list(message.texts)
    tree.finishes = [Finish(f) for f in message.finish_reasons]
    try:
        tree.validate()
    except ValueError as error:
        raise FieldError("tree", str(error), "counts of a grown tree") from error
    return tree


def _check_columns(message: pb.Tree, n: int, tokens: int) -> None:
    for name in (*_COUNTS, "reward_sums", "ib_scores", "finish_reasons"):
        if len(getattr(message, name)) != n:
            raise FieldError(
                f"tree.{name}", f"{len(getattr(message, name))} entries", f"{n}, one a node"
            )
    if not n or message.parents[0] or any(p >= i for i, p in enumerate(message.parents[1:], 1)):
        raise FieldError("tree.parents", "not in order", "0 for the root, parents before children")
    offsets = list(message.token_offsets)
    steps = np.diff(offsets) if len(offsets) == n + 1 else np.zeros(0)
    if len(steps) != n or offsets[:2] != [0, 0] or (steps[1:] < 1).any() or offsets[-1] != tokens:
        raise FieldError(
            "tree.token_offsets", "do not cut the tokens", f"{n + 1} from 0 to {tokens}"
        )
    if len(message.logprobs) != tokens or sum(message.span_lengths) != tokens:
        raise FieldError(
            "tree.logprobs", "or span_lengths do not match token_ids", f"{tokens} tokens"
        )
    if len(message.texts) not in (0, n):
        raise FieldError("tree.texts", f"{len(message.texts)} entries", f"0 or {n}, one a node")
    if len(message.span_lengths) != len(message.span_versions):
        raise FieldError("tree.span_versions", f"{len(message.span_versions)}", "one a span")
    if any(version >= 2**63 for version in message.span_versions):
        raise FieldError("tree.span_versions", "too large", "below 2^63")
    if not set(message.finish_reasons) <= set(Finish):
        raise FieldError("tree.finish_reasons", "unknown reason", f"0 to {max(Finish)}")
    if int(message.stop_cause) not in list(StopCause):
        raise FieldError(
            "tree.stop_cause", f"unknown {message.stop_cause}", f"0 to {max(StopCause)}"
        )
    if not all(math.isfinite(lp) for lp in message.logprobs):
        raise FieldError("tree.logprobs", "not finite", "finite log-probabilities")
