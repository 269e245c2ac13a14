"""A RewardService as a process of its own: `python -m tests.fault.soak.reward_service PORT`.

Answers are compared exactly. A prompt whose answer is POISON has trajectories that no service can
grade: that is their own fault, and it says so.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from ibtree.wire.v1 import reward_pb2 as pb
from ibtree.wire.v1 import reward_pb2_grpc

POISON = "poison"
READY = "grading"
GRADE_S = 0.2
"""Growing is slower than training by this: prompts wait to be grown."""
_MARKER = "####"


class Exact(reward_pb2_grpc.RewardServiceServicer):
    """1 for the answer behind the marker, else 0."""

    def Grade(self, request: pb.GradeRequest, context: Any) -> pb.GradeResponse:
        if any(one.answer == POISON for one in request.trajectories):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "this prompt cannot be graded")
        time.sleep(GRADE_S)
        return pb.GradeResponse(
            rewards=[
                float(one.completion.rpartition(_MARKER)[2].strip() == one.answer)
                for one in request.trajectories
            ]
        )


def main(port: str) -> None:
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    reward_pb2_grpc.add_RewardServiceServicer_to_server(Exact(), server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    print(f"{READY} on 127.0.0.1:{bound}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main(sys.argv[1])
