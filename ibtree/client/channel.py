"""How calls are made: channel options, failures in one readable line, when to try again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from ibtree.errors import ERROR_KEY, Fault, FieldError, IbtpoError
from ibtree.wire.calls import Call

R = TypeVar("R")

DEFAULT_TARGET = "127.0.0.1:7300"
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_REMEDY = "start ibtpo-server or give its address"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 3.0
_STRANGER_ATTEMPTS = 5
"""Attempts at a server that never answered: most likely none is there."""
CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    # `Attempts` does it, until the call's deadline; and gRPC's own retries of a stream whose sender
    # still waits for an answer hang, beyond the deadline
    ("grpc.enable_retries", 0),
    # a server that comes back is seen in seconds, not minutes
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


class RpcFailed(IbtpoError, RuntimeError):
    """A call failed: `code` is the gRPC status; the message says what and where in one line.
    `retry_after_s`: when the server wants to be asked again; None: it did not say. `answered`:
    whether the server itself said so, and not the connection to it."""

    fault = Fault.DEPENDENCY

    def __init__(
        self,
        method: str,
        target: str,
        code: grpc.StatusCode,
        details: str,
        retry_after_s: float | None = None,
        answered: bool = False,
    ) -> None:
        super().__init__(f"{method} at {target}: {code.name}: {details}")
        self.code, self.details, self.retry_after_s = code, details, retry_after_s
        self.answered = answered
        self.status = code.name


def failure(method: str, target: str, error: Any) -> RpcFailed:
    """The RpcFailed of a grpc.RpcError that ended a call."""
    code, details = error.code(), error.details() or "no details"
    if code is grpc.StatusCode.UNAVAILABLE and "connect" in details.lower():
        details = f"no server answers there; {_REMEDY}"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and details == "Deadline Exceeded":
        details = f"no answer in time; {_REMEDY}"
    hints = dict(error.trailing_metadata() or ())
    hint_ms = float(hints.get("grpc-retry-pushback-ms", -1))
    hint_s = hint_ms / 1000 if hint_ms >= 0 else None
    failed = RpcFailed(method, target, code, details, hint_s, ERROR_KEY in hints)
    failed.__cause__ = error
    return failed


def decoded(call: Call[R], target: str, message: Any) -> R:
    """The noun of a response. Raises RpcFailed for one that can not be: the server is to blame."""
    return decoding(call.method.name, target, lambda: call.decode(message))


def decoding(method: str, target: str, decode: Callable[[], R]) -> R:
    """What `decode` returns. Raises RpcFailed where it raises FieldError."""
    try:
        return decode()
    except FieldError as error:
        details = f"the server's answer is wrong: {error}"
        raise RpcFailed(method, target, grpc.StatusCode.INTERNAL, details) from error


class Attempts:
    """The attempts of one call within its time limit: which failure is followed by another one.

    A server that was too busy is asked again when it said. A connection that broke, or a server
    that is away, is tried again with growing pauses: for the rest of the time (at most for
    `patience_s`) if this client has had an answer before, a few times if not. What the server
    itself calls UNAVAILABLE is tried a few times.
    """

    def __init__(
        self, timeout_s: float, patience_s: float | None = None, *, known: bool = False
    ) -> None:
        """`known`: the server has answered this client before, or is to be waited for."""
        now = time.monotonic()
        self._until, self._patience_s, self._known = now + timeout_s, patience_s, known
        self._away_since: float | None = None
        self._failures = 0
        """In a row, without a message between."""

    @property
    def left_s(self) -> float:
        return max(self._until - time.monotonic(), 0.001)

    def answered(self) -> None:
        """A message came: the server is there."""
        self._known, self._failures, self._away_since = True, 0, None

    def pause_s(self, failed: RpcFailed) -> float:
        """Seconds until the next attempt; raises the failure if there is none."""
        self._known |= failed.answered
        if failed.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            pause_s = failed.retry_after_s
        elif failed.code is grpc.StatusCode.UNAVAILABLE:
            pause_s = self._pause_s(failed)
        else:
            pause_s = None
        if pause_s is None or pause_s >= self.left_s:
            raise failed
        return pause_s

    def _pause_s(self, failed: RpcFailed) -> float | None:
        self._failures += 1
        self._away_since = self._away_since or time.monotonic()
        away_s = time.monotonic() - self._away_since
        tired = self._patience_s is not None and away_s > self._patience_s
        stranger = failed.answered or not self._known
        if tired or (stranger and self._failures >= _STRANGER_ATTEMPTS):
            return None
        pause_s = min(_FIRST_PAUSE_S * 2.0 ** (self._failures - 1), _LONGEST_PAUSE_S)
        return pause_s * random.uniform(0.8, 1.0)  # clients of one server do not come back as one
