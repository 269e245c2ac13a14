"""CacheService: the state of the radix cache, and its audit."""

from __future__ import annotations

from typing import Any

from ibtree.options import check_range
from ibtree.v1 import cache_pb2 as pb
from ibtree.v1 import cache_pb2_grpc
from ibtree.wire_calls import audit_to_proto, cache_to_proto
from server_ext.audit import Auditor
from server_ext.services.errors import reported
from server_ext.tree_cache import TreeCache

_SAMPLES, _MAX_SAMPLES = 32, 1024


class CacheService(cache_pb2_grpc.CacheServiceServicer):
    """See protos/ibtree/v1/cache.proto."""

    def __init__(self, trees: TreeCache, auditor: Auditor) -> None:
        self._trees, self._auditor = trees, auditor

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
