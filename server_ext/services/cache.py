"""CacheService: the state of the radix cache, and its audit."""

from __future__ import annotations

from typing import Any

from ibtree.tree.options import check_range
from ibtree.wire.messages import audit_to_proto, cache_to_proto
from ibtree.wire.v1 import cache_pb2 as pb
from ibtree.wire.v1 import cache_pb2_grpc
from server_ext.cache.audit import Auditor
from server_ext.cache.client import TreeCache
from server_ext.services.statuses import reported

_SAMPLES, _MAX_SAMPLES = 32, 1024


class CacheService(cache_pb2_grpc.CacheServiceServicer):
    """See protos/ibtree/v1/cache.proto."""

    def __init__(self, trees: TreeCache, auditor: Auditor) -> None:
        self._trees, self._auditor = trees, auditor

    def add_to(self, server: Any) -> None:
        cache_pb2_grpc.add_CacheServiceServicer_to_server(self, server)

    async def GetCache(self, request: pb.GetCacheRequest, context: Any) -> pb.GetCacheResponse:
        async with reported(context):
            return cache_to_proto(await self._trees.state())

    async def AuditCache(
        self, request: pb.AuditCacheRequest, context: Any
    ) -> pb.AuditCacheResponse:
        async with reported(context):
            samples = request.samples if request.HasField("samples") else _SAMPLES
            check_range("samples", samples, 1, _MAX_SAMPLES)
            return audit_to_proto(await self._auditor.audit(samples))
