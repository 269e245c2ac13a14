"""A leased tree too large for the response, read over as many streams as it takes."""

from __future__ import annotations

import grpc

from ibtree.client.channel import RpcFailed
from ibtree.client.push import Resumption
from ibtree.messages import TreeLease
from ibtree.wire import calls
from ibtree.wire.calls import Call
from ibtree.wire.queue import lease_read


class TreeReading:
    """What was read of one lease's tree; each `call` asks for what comes next."""

    def __init__(self, lease: TreeLease) -> None:
        self._lease, self._data = lease, bytearray()
        self._resumption = Resumption()

    @property
    def complete(self) -> bool:
        return len(self._data) >= self._lease.unread_bytes

    def call(self) -> Call[bytes]:
        return calls.read_tree(self._lease.lease_id, len(self._data))

    def add(self, data: bytes) -> None:
        self._data += data

    def pause_s(self, failed: RpcFailed) -> float:
        """Seconds until the next attempt; raises the failure if that is of no use."""
        return self._resumption.pause_s(failed, len(self._data))

    def ended(self, target: str) -> None:
        """A stream ended by itself. Raises RpcFailed if the tree is not whole then."""
        if not self.complete:
            problem = f"ended after {len(self._data)} of {self._lease.unread_bytes} bytes"
            raise RpcFailed("ReadTree", target, grpc.StatusCode.DATA_LOSS, problem)

    def lease(self) -> TreeLease:
        return lease_read(self._lease, bytes(self._data))
