"""The grader `remote`: the user's RewardService (protos/ibtree/v1/reward.proto)."""

from __future__ import annotations

import json

import grpc
import grpc.aio

from ibtree.errors import FieldError
from ibtree.messages import Submission
from ibtree.wire import calls
from server_ext.errors import BadRewardError, GraderUnavailableError, GradingRefusedError

_RETRY = {
    "maxAttempts": 5,
    "initialBackoff": "0.1s",
    "maxBackoff": "3s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
_SERVICE = {"methodConfig": [{"name": [{}], "retryPolicy": _RETRY}]}
_REFUSED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE)
_OPTIONS = [
    ("grpc.service_config", json.dumps(_SERVICE)),
    ("grpc.max_reconnect_backoff_ms", 2000),  # gRPC would leave a long outage two minutes late
]


class RemoteGrader:
    """Asks the service at `address` (host:port). A call has `timeout_s`; within it the channel
    waits for a connection and retries UNAVAILABLE. No grade interrupts the tree, it is not a 0."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self._address, self._timeout_s = address, timeout_s
        self._channel = grpc.aio.insecure_channel(address, _OPTIONS)
        self._grade = calls.GRADE.on(self._channel.unary_unary)

    def check(self, answer: str) -> None:
        """The service itself knows whether it needs an answer."""
        if not self._address:
            problem = "the grader 'remote' needs the server's setting reward_address"
            raise FieldError("grader", problem, "another, or a server with --reward-address")

    async def grade(self, submission: Submission) -> float:
        """Raises GraderUnavailableError if the call fails, BadRewardError for an answer that is no
        reward, GradingRefusedError if the service finds the trajectory itself at fault
        (INVALID_ARGUMENT, OUT_OF_RANGE)."""
        call = calls.grade([submission])
        try:
            response = await self._grade(call.request, timeout=self._timeout_s, wait_for_ready=True)
            return call.decode(response)[0]
        except grpc.aio.AioRpcError as error:
            problem = f"{error.code().name}: {error.details()}"
            kind = GradingRefusedError if error.code() in _REFUSED else GraderUnavailableError
            raise kind(f"the reward service {self._address} failed: {problem}") from error
        except ValueError as error:
            raise BadRewardError(f"the reward service {self._address}: {error}") from error

    async def close(self) -> None:
        await self._channel.close(None)
