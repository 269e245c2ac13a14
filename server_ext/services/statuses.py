"""Errors of the house as gRPC statuses."""

from __future__ import annotations

import errno
import logging
from typing import Any

import grpc

from ibtree.errors import IbtpoError
from server_ext.errors import BusyError, DiskFullError

_log = logging.getLogger(__name__)
_MOST_DETAILS = 1600
_FULL = (errno.ENOSPC, errno.EDQUOT)


def _short(text: str) -> str:
    """Details travel as metadata, whose size gRPC limits; input may be quoted in them."""
    return text if len(text) <= _MOST_DETAILS else f"{text[:1200]} … {text[-400:]}"


def _hint(error: Exception) -> tuple[tuple[str, str], ...]:
    """gRPC's own trailing metadata for "come back later"."""
    if not isinstance(error, BusyError | DiskFullError):
        return ()
    return (("grpc-retry-pushback-ms", str(round(error.retry_after_s * 1000))),)


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
            await self._context.abort(code, _short(str(error)), _hint(error))
        if isinstance(error, OSError) and error.errno in _FULL:
            problem = f"the server's disk is full ({error}); nothing was taken"
            await self._context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, _short(problem))
        _log.error("a call failed", exc_info=error)
        await self._context.abort(
            grpc.StatusCode.INTERNAL, _short(f"{type(error).__name__}: {error}")
        )
