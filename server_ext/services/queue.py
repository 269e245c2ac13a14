"""TreeQueueService: leases over scored trees."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from google.protobuf.message import DecodeError

from ibtree.errors import FieldError
from ibtree.messages import QueueStats
from ibtree.tree.options import check_range
from ibtree.wire.messages import stats_to_proto
from ibtree.wire.v1 import queue_pb2 as pb
from ibtree.wire.v1 import queue_pb2_grpc, tree_pb2
from server_ext.errors import UnknownLeaseError
from server_ext.queue.journal import Journal, Leased
from server_ext.queue.journal_thread import JournalThread
from server_ext.queue.producer import OPERATOR, Producer
from server_ext.services.statuses import reported

_log = logging.getLogger(__name__)
_MAX_TREES = 1024
_MAX_LEASE_S = 86400.0
_MAX_WAIT_S = 600.0
_MAX_REASON_CHARACTERS = 256
_MAX_RESPONSE_BYTES = 3 * 1024 * 1024  # below gRPC's default limit of 4 MiB


class QueueService(queue_pb2_grpc.TreeQueueServiceServicer):
    """See protos/ibtree/v1/queue.proto."""

    def __init__(
        self,
        journal: JournalThread,
        producer: Producer,
        lease_s: float,
        interactive: Callable[[], int],
    ) -> None:
        self._journal, self._producer = journal, producer
        self._lease_s, self._interactive = lease_s, interactive

    def add_to(self, server: Any) -> None:
        queue_pb2_grpc.add_TreeQueueServiceServicer_to_server(self, server)

    async def LeaseTrees(
        self, request: pb.LeaseTreesRequest, context: Any
    ) -> pb.LeaseTreesResponse:
        async with reported(context):
            check_range("max_trees", request.max_trees, 1, _MAX_TREES)
            wait_s = request.wait_s if request.HasField("wait_s") else 0.0
            check_range("wait_s", wait_s, 0.0, _MAX_WAIT_S)
            lease_s = self._lease(request)
            until = time.monotonic() + wait_s
            leases: list[pb.TreeLease] = []
            while not leases:
                leased = await self._journal(
                    Journal.lease, request.max_trees, lease_s, _MAX_RESPONSE_BYTES
                )
                leases = [lease for row in leased if (lease := await self._readable(row))]
                if leased and not leases:
                    continue  # all were unreadable, and are gone: the next ones
                left_s = until - time.monotonic()
                if left_s <= 0 or self._producer.stopping:
                    break
                if not leases:  # look again at least every second: leases run out silently
                    await self._producer.graded(min(left_s, 1.0))
            return pb.LeaseTreesResponse(leases=leases)

    async def ExtendLease(
        self, request: pb.ExtendLeaseRequest, context: Any
    ) -> pb.ExtendLeaseResponse:
        async with reported(context):
            lease_s = self._lease(request)
            await self._journal(Journal.extend, list(request.lease_ids), lease_s)
        return pb.ExtendLeaseResponse()

    async def AckTrees(self, request: pb.AckTreesRequest, context: Any) -> pb.AckTreesResponse:
        async with reported(context):
            await self._journal(Journal.ack, list(request.lease_ids))
        return pb.AckTreesResponse()

    async def NackTrees(self, request: pb.NackTreesRequest, context: Any) -> pb.NackTreesResponse:
        async with reported(context):
            await self._journal(Journal.nack, list(request.lease_ids), request.reason)
            await self._producer.wake_leasers()
        return pb.NackTreesResponse()

    async def GetQueueStats(
        self, request: pb.GetQueueStatsRequest, context: Any
    ) -> pb.GetQueueStatsResponse:
        async with reported(context):
            counts = await self._journal(Journal.counts)
            named = {state.value: count for state, count in counts.items()}
            held = self._producer.taking.reasons
            return stats_to_proto(QueueStats(**named, interactive=self._interactive(), held=held))

    async def PauseQueue(
        self, request: pb.PauseQueueRequest, context: Any
    ) -> pb.PauseQueueResponse:
        async with reported(context):
            self._hold(request.reason or "paused")
            return pb.PauseQueueResponse(growing=await self._producer.idle(0.0))

    async def ResumeQueue(
        self, request: pb.ResumeQueueRequest, context: Any
    ) -> pb.ResumeQueueResponse:
        async with reported(context):
            self._producer.taking.release(OPERATOR)
            return pb.ResumeQueueResponse(held=self._producer.taking.reasons)

    async def DrainQueue(
        self, request: pb.DrainQueueRequest, context: Any
    ) -> pb.DrainQueueResponse:
        async with reported(context):
            wait_s = request.wait_s if request.HasField("wait_s") else 0.0
            check_range("wait_s", wait_s, 0.0, _MAX_WAIT_S)
            self._hold(request.reason or "drained")
            return pb.DrainQueueResponse(growing=await self._producer.idle(wait_s))

    def _hold(self, reason: str) -> None:
        if len(reason) > _MAX_REASON_CHARACTERS:
            problem = f"{len(reason)} characters"
            raise FieldError("reason", problem, f"at most {_MAX_REASON_CHARACTERS}")
        self._producer.taking.hold(OPERATOR, reason)

    async def _readable(self, leased: Leased) -> pb.TreeLease | None:
        """The lease with its tree; None for bytes that are none, which the journal then buries."""
        try:
            tree = tree_pb2.Tree.FromString(leased.tree)
        except DecodeError as error:
            reason = f"the journal's {len(leased.tree)} bytes are no tree: {error}"
            _log.error("lease %s: %s", leased.lease_id, reason)
            with suppress(UnknownLeaseError):  # ran out meanwhile: it comes again
                await self._journal(Journal.bury, [leased.lease_id], reason)
            return None
        return pb.TreeLease(lease_id=leased.lease_id, tree=tree, returns=leased.returns)

    def _lease(self, request: pb.LeaseTreesRequest | pb.ExtendLeaseRequest) -> float:
        if not request.HasField("lease_s"):
            return self._lease_s
        check_range("lease_s", request.lease_s, 0.0, _MAX_LEASE_S, open_low=True)
        return request.lease_s
