"""TreeQueueService: leases over scored trees, and an operator's look at them."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from google.protobuf.message import DecodeError

from ibtree.errors import FieldError
from ibtree.messages import QueueStats
from ibtree.tree.options import check_length, check_range
from ibtree.wire.messages import stats_to_proto
from ibtree.wire.queue import choice_from_proto, entry_to_proto, state_from_proto
from ibtree.wire.v1 import queue_pb2 as pb
from ibtree.wire.v1 import queue_pb2_grpc
from server_ext.errors import UnknownLeaseError
from server_ext.queue.inspection import Chosen, cancel, listed, purge, revive
from server_ext.queue.journal import Journal
from server_ext.queue.journal_thread import JournalThread
from server_ext.queue.leases import Leased
from server_ext.queue.producer import OPERATOR, Producer
from server_ext.queue.states import PURGEABLE, State
from server_ext.services.statuses import reported

_log = logging.getLogger(__name__)
_MAX_TREES = 1024
_MAX_LEASE_S = 86400.0
_MAX_WAIT_S = 600.0
_MAX_HOLD_CHARACTERS = 256
_MAX_RESPONSE_BYTES = 3 * 1024 * 1024  # below gRPC's default limit of 4 MiB
_MAX_IDS, _MAX_LISTED, _LISTED = 10_000, 200, 100
_MAX_ID_CHARACTERS, _MAX_REASON_CHARACTERS = 256, 4096


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
            lease_s, run = self._lease(request), _run(request)
            until = time.monotonic() + wait_s
            leases: list[pb.TreeLease] = []
            while not leases:
                leased = await self._journal(
                    Journal.lease, request.max_trees, lease_s, _MAX_RESPONSE_BYTES, run
                )
                if leased:
                    self._producer.notify()  # growing may have waited for fewer to be graded
                leases = [lease for row in leased if (lease := await self._readable(row))]
                if leased and not leases:
                    continue  # all were unreadable, and are gone: the next ones
                left_s = until - time.monotonic()
                if left_s <= 0 or self._producer.stopping:
                    break
                if not leases:  # look again at least every second: leases run out silently
                    await self._producer.graded(min(left_s, 1.0))
            return pb.LeaseTreesResponse(leases=leases)

    async def ReadTree(
        self, request: pb.ReadTreeRequest, context: Any
    ) -> AsyncIterator[pb.ReadTreeResponse]:
        async with reported(context):
            start = request.start
            if start < 0:
                raise FieldError("start", f"got {start}", "0 or more")
            while data := await self._journal(Journal.read, request.lease_id, start):
                start += len(data)
                yield pb.ReadTreeResponse(data=data)

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
            check_length("reason", request.reason, _MAX_REASON_CHARACTERS)
            await self._journal(
                Journal.nack, list(request.lease_ids), request.reason, bad=request.bad
            )
            await self._producer.wake_leasers()
        return pb.NackTreesResponse()

    async def GetQueueStats(
        self, request: pb.GetQueueStatsRequest, context: Any
    ) -> pb.GetQueueStatsResponse:
        async with reported(context):
            counts = await self._journal(Journal.counts, _run(request))
            named = {state.value: count for state, count in counts.items()}
            stats = QueueStats(**named, interactive=self._interactive(), holds=self._producer.holds)
            return stats_to_proto(stats)

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
            return pb.ResumeQueueResponse(holds=self._producer.holds)

    async def DrainQueue(
        self, request: pb.DrainQueueRequest, context: Any
    ) -> pb.DrainQueueResponse:
        async with reported(context):
            wait_s = request.wait_s if request.HasField("wait_s") else 0.0
            check_range("wait_s", wait_s, 0.0, _MAX_WAIT_S)
            self._hold(request.reason or "drained")
            return pb.DrainQueueResponse(growing=await self._producer.idle(wait_s))

    def _hold(self, reason: str) -> None:
        check_length("reason", reason, _MAX_HOLD_CHARACTERS)
        self._producer.taking.hold(OPERATOR, reason)

    async def ListTrees(self, request: pb.ListTreesRequest, context: Any) -> pb.ListTreesResponse:
        async with reported(context):
            state, run = _state(request.state), _run(request)
            most = request.max_trees if request.HasField("max_trees") else _LISTED
            check_range("max_trees", most, 1, _MAX_LISTED)
            entries = await self._journal(listed, state, run, request.after, most + 1)
            response = pb.ListTreesResponse(more=len(entries) > most)
            left = _MAX_RESPONSE_BYTES
            for entry in entries[:most]:
                message = entry_to_proto(entry)
                left -= message.ByteSize()
                if left < 0 and response.trees:
                    response.more = True
                    break
                response.trees.append(message)
            return response

    async def ReviveTrees(
        self, request: pb.ReviveTreesRequest, context: Any
    ) -> pb.ReviveTreesResponse:
        async with reported(context):
            revived = await self._journal(revive, _chosen("trees", request.trees))
            self._producer.notify()
            return pb.ReviveTreesResponse(revived=revived)

    async def PurgeTrees(
        self, request: pb.PurgeTreesRequest, context: Any
    ) -> pb.PurgeTreesResponse:
        async with reported(context):
            state = _state(request.state) or State.DEAD
            if state not in PURGEABLE:
                raise FieldError("state", f"{state} trees are in use", " | ".join(PURGEABLE))
            purged = await self._journal(purge, _chosen("trees", request.trees), state)
            self._producer.notify()
            return pb.PurgeTreesResponse(purged=purged)

    async def CancelPrompts(
        self, request: pb.CancelPromptsRequest, context: Any
    ) -> pb.CancelPromptsResponse:
        async with reported(context):
            chosen = _chosen("prompts", request.prompts)
            self._producer.abandon(chosen.ids, chosen.run)
            cancelled = await self._journal(cancel, chosen)
            return pb.CancelPromptsResponse(cancelled=cancelled)

    async def _readable(self, leased: Leased) -> pb.TreeLease | None:
        """The lease with its tree; None for bytes that are none, which the journal then buries."""
        lease = pb.TreeLease(
            lease_id=leased.lease_id,
            returns=leased.returns,
            tree_id=leased.id,
            tree_bytes=leased.tree_bytes,
        )
        if leased.tree is None:
            return lease
        try:
            lease.tree.ParseFromString(leased.tree)
        except DecodeError as error:
            reason = f"the journal's {len(leased.tree)} bytes are no tree: {error}"
            _log.error("lease %s: %s", leased.lease_id, reason)
            with suppress(UnknownLeaseError):  # ran out meanwhile: it comes again
                await self._journal(Journal.bury, [leased.lease_id], reason)
            return None
        return lease

    def _lease(self, request: pb.LeaseTreesRequest | pb.ExtendLeaseRequest) -> float:
        if not request.HasField("lease_s"):
            return self._lease_s
        check_range("lease_s", request.lease_s, 0.0, _MAX_LEASE_S, open_low=True)
        return request.lease_s


def _run(
    request: pb.LeaseTreesRequest | pb.GetQueueStatsRequest | pb.ListTreesRequest | pb.TreeChoice,
) -> str | None:
    if not request.HasField("run"):
        return None
    check_length("run", request.run, _MAX_ID_CHARACTERS)
    return request.run


def _state(number: int) -> State | None:
    name = state_from_proto(number)
    return None if name is None else State(name)


def _chosen(field: str, message: pb.TreeChoice) -> Chosen:
    """Raises FieldError unless one way of choosing is used: nothing is meant by accident."""
    choice = choice_from_proto(message)
    if (bool(choice.ids), choice.run is not None, choice.all).count(True) != 1:
        raise FieldError(field, "not one of ids, run and all", "exactly one of them")
    if len(choice.ids) > _MAX_IDS:
        raise FieldError(f"{field}.ids", f"got {len(choice.ids)}", f"at most {_MAX_IDS}")
    return Chosen(choice.ids, _run(message))
