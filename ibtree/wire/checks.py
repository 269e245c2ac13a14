"""What comes over the wire must be: checked before anything is made of it, in both directions.

Everything raises FieldError with the field's name.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from ibtree.errors import FieldError
from ibtree.tree import Finish, Ledger, StopCause
from ibtree.tree.options import MAX_SEED, MAX_TRAJECTORIES
from ibtree.wire.v1 import tree_pb2 as pb

COUNTS = ("draws", "visits", "starts", "ends")
_LOGPROBS = (-1e9, 1e-4)
"""A log-probability is at most 0, but for what the engine's rounding makes of a certain token; at
the lowest temperature the unlikeliest tokens have some -1e8. [nats]"""
_SLACK = 1e-6
"""Sums of rewards are rounded."""


def check_natural(field: str, value: int, low: int = 0) -> int:
    """A count, or an index."""
    if value < low:
        raise FieldError(field, f"got {value}", f"at least {low}")
    return value


def check_finite(field: str, value: float, low: float = 0.0, high: float = math.inf) -> float:
    """A finite number in [low, high]."""
    if not (math.isfinite(value) and low <= value <= high):
        allowed = f"a finite number of at least {low:g}" if high == math.inf else f"[{low}, {high}]"
        raise FieldError(field, f"got {value}", allowed)
    return value


def check_member(field: str, value: int, members: type[IntEnum]) -> int:
    """A member's number."""
    if value not in [*members]:
        raise FieldError(field, f"unknown {value}", f"0 to {max(members)}")
    return value


def check_numbers(field: str, message: Any, names: Collection[str]) -> dict[str, Any]:
    """Fields of the message by name: whole numbers of at least 0, finite ones of at least 0."""
    values = {name: getattr(message, name) for name in names}
    for name, value in values.items():
        check = check_finite if isinstance(value, float) else check_natural
        check(f"{field}.{name}", value)
    return values


def check_logprobs(field: str, values: Collection[float]) -> None:
    """Log-probabilities [nats]."""
    array = np.asarray(values, np.float64)
    low, high = _LOGPROBS
    wrong = ~((low <= array) & (array <= high))  # also what is not a number
    if wrong.any():
        raise FieldError(field, f"got {array[wrong][0]}", f"log-probabilities in [{low:g}, 0]")


def check_tree(message: pb.Tree, most_trajectories: int) -> None:
    """Columns that make a tree of at most so many trajectories, and scalars that can be; whether
    the counts of each node add up is for Tree.validate."""
    _check_lengths(message)
    _check_offsets(message)
    _check_tokens(message)
    _check_counts(message, min(most_trajectories, MAX_TRAJECTORIES))
    _check_rewards(message)
    for reason in set(message.finish_reasons):
        check_member("tree.finish_reasons", reason, Finish)
    check_member("tree.stop_cause", int(message.stop_cause), StopCause)
    check_numbers("tree.ledger", message.ledger, [*Ledger.__dataclass_fields__, "unique_tokens"])
    if message.ledger.seed > MAX_SEED:
        raise FieldError("tree.ledger.seed", f"got {message.ledger.seed}", f"0 to {MAX_SEED}")


def _check_lengths(message: pb.Tree) -> None:
    n = len(message.parents)
    for name in (*COUNTS, "reward_sums", "ib_scores", "finish_reasons"):
        length = len(getattr(message, name))
        if length != n:
            raise FieldError(f"tree.{name}", f"{length} entries", f"{n}, one a node")
    if len(message.texts) not in (0, n):
        raise FieldError("tree.texts", f"{len(message.texts)} entries", f"0 or {n}, one a node")


def _check_tokens(message: pb.Tree) -> None:
    tokens = len(message.token_ids)
    if len(message.logprobs) != tokens or sum(message.span_lengths) != tokens:
        problem = "or span_lengths do not match token_ids"
        raise FieldError("tree.logprobs", problem, f"{tokens} tokens")
    if len(message.span_lengths) != len(message.span_versions):
        raise FieldError("tree.span_versions", f"{len(message.span_versions)}", "one a span")
    if any(version >= 2**63 for version in message.span_versions):
        raise FieldError("tree.span_versions", "too large", "below 2^63")
    check_logprobs("tree.logprobs", message.logprobs)


def _check_offsets(message: pb.Tree) -> None:
    parents, offsets = _ints(message.parents), _ints(message.token_offsets)
    n, tokens = len(parents), len(message.token_ids)
    if not n or parents[0] or (parents[1:] >= np.arange(1, n)).any():
        raise FieldError("tree.parents", "not in order", "0 for the root, parents before children")
    fits = len(offsets) == n + 1 and not offsets[:2].any() and offsets[-1] == tokens
    if not fits or (np.diff(offsets)[1:] < 1).any():
        allowed = f"{n + 1} from 0 to {tokens}"
        raise FieldError("tree.token_offsets", "do not cut the tokens", allowed)


def _check_counts(message: pb.Tree, most_trajectories: int) -> None:
    draws, visits, starts, ends = (_ints(getattr(message, name)) for name in COUNTS)
    if visits[0] > most_trajectories:
        allowed = f"at most {most_trajectories}, as tree.options say"
        raise FieldError("tree.visits", f"{visits[0]} trajectories", allowed)
    if ends[0]:
        problem = f"{ends[0]} trajectories end at the root"
        raise FieldError("tree.ends", problem, "0: a trajectory has a step")
    for name, column in (("draws", draws), ("visits", visits)):
        if not column[1:].all():
            node = 1 + int(np.argmin(column[1:]))
            raise FieldError(f"tree.{name}", f"0 at node {node}", "at least 1 but at the root")
    if (above := np.flatnonzero(ends[1:] > draws[1:])).size:
        node = 1 + int(above[0])
        problem = f"{ends[node]} at node {node}, whose draws are {draws[node]}"
        raise FieldError("tree.ends", problem, "at most draws")
    if starts.max() > visits[0]:
        raise FieldError("tree.starts", f"got {starts.max()}", f"at most {visits[0]}")


def _check_rewards(message: pb.Tree) -> None:
    sums, visits = np.asarray(message.reward_sums, np.float64), _ints(message.visits)
    wrong = ~((sums >= -_SLACK) & (sums <= visits + _SLACK))  # also what is not a number
    if wrong.any():
        problem = f"{sums[wrong][0]} at node {int(np.argmax(wrong))}"
        raise FieldError("tree.reward_sums", problem, "0 to visits: rewards are in [0, 1]")
    if np.isinf(np.asarray(message.ib_scores)).any():
        raise FieldError("tree.ib_scores", "infinite", "finite, or NaN at a leaf")
    if message.HasField("first_round_reward"):
        check_finite("tree.first_round_reward", message.first_round_reward, 0.0, 1.0)


def _ints(values: Collection[int]) -> npt.NDArray[np.int64]:
    return np.asarray(values, np.int64)
