"""Errors of the house as gRPC statuses."""

from __future__ import annotations

import errno
import logging
from typing import Any

import grpc

from ibtree.errors import ERROR_KEY, IbtpoError
from server_ext.errors import BusyError, DiskFullError

_log = logging.getLogger(__name__)
_MOST_DETAILS = 1600
_FULL = (errno.ENOSPC, errno.EDQUOT)


def _short(text: str) -> str:
    """Details travel as metadata, whose size gRPC limits; input may be quoted in them."""
    return text if len(text) <= _MOST_DETAILS else f"{text[:1200]} … {text[-400:]}"


def _metadata(error: Exception) -> tuple[tuple[str, str], ...]:
    """Says that it is no broken connection; and gRPC's own hint for "come back later"."""
    own = ((ERROR_KEY, type(error).__name__),)
    if not isinstance(error, BusyError | DiskFullError):
        return own
    return (*own, ("grpc-retry-pushback-ms", str(round(error.retry_after_s * 1000))))


class reported:
    """Turns an error raised inside into the call's status, its text into the details."""

    def __init__(self, context: Any) -> None:
        self._context = context

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, grpc.aio.AbortError):
            return
        if isinstance(error, IbtpoError):
            code = grpc.StatusCode[error.status]
            await self._context.abort(code, _short(str(error)), _metadata(error))
        if isinstance(error, OSError) and error.errno in _FULL:
            problem = f"the server's disk is full ({error}); nothing was taken"
            full = grpc.StatusCode.RESOURCE_EXHAUSTED
            await self._context.abort(full, _short(problem), _metadata(error))
        _log.error("a call failed", exc_info=error)
        told = _short(f"{type(error).__name__}: {error}")
        await self._context.abort(grpc.StatusCode.INTERNAL, told, _metadata(error))
