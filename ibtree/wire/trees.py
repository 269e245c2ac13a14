"""Tree and options <-> protobuf. Nothing else knows both (the service files only pass messages)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from itertools import groupby
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from ibtree.errors import FieldError
from ibtree.tree import Finish, Ledger, Step, StopCause, Tree
from ibtree.tree.options import SamplingOptions, TreeOptions, completed
from ibtree.tree.score import ib_scores
from ibtree.wire.checks import COUNTS, check_tree
from ibtree.wire.v1 import tree_pb2 as pb


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
        **{name: [getattr(tree, name)[n] for n in nodes] for name in COUNTS},
    )


def tree_to_bytes(tree: Tree) -> bytes:
    """The serialized ibtree.v1.Tree."""
    return tree_to_proto(tree).SerializeToString()


def tree_from_bytes(data: bytes) -> Tree:
    """The Tree that `tree_to_bytes` serialized. Raises FieldError as `tree_from_proto` does."""
    try:
        message = pb.Tree.FromString(data)
    except DecodeError as error:
        raise FieldError("tree", f"{len(data)} bytes are none: {error}", "a Tree") from error
    return tree_from_proto(message)


def tree_from_proto(message: pb.Tree) -> Tree:
    """Raises FieldError where the columns do not make a tree that can have grown with its options;
    then nothing was built."""
    options = options_from_proto(message.options, TreeOptions())
    check_tree(message, options.trajectories)
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
        options=options,
        stop_cause=StopCause(message.stop_cause),
        ledger=Ledger(**{f.name: getattr(message.ledger, f.name) for f in fields(Ledger)}),
    )
    for i in range(1, len(message.parents)):
        low, high = message.token_offsets[i], message.token_offsets[i + 1]
        ids, logprobs = tuple(message.token_ids[low:high]), tuple(message.logprobs[low:high])
        node = tree.graft(message.parents[i], Step(ids, logprobs, tuple(versions[low:high])))
        if node != i:
            raise FieldError("tree.token_ids", f"node {i} repeats a sibling", "distinct siblings")
    for name in COUNTS:
        setattr(tree, name, list(getattr(message, name)))
    tree.reward_sums = list(message.reward_sums)
    tree.texts = list(message.texts)
    tree.finishes = [Finish(f) for f in message.finish_reasons]
    try:
        tree.validate()
    except ValueError as error:
        raise FieldError("tree", str(error), "counts of a grown tree") from error
    return tree
