"""How a call's message may arrive: how large it may be, and how long it may take.

gRPC calls a handler of one message when the message is there, and waits for it as long as the
caller likes. So here such a handler is called as one of a stream, from its beginning, and reads
the one message itself: in time, or the call ends. It looks the same to the caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from inspect import isasyncgenfunction, isawaitable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from ibtree.wire.calls import MESSAGE_BYTES

Handler = Any  # grpc.RpcMethodHandler, which the stubs describe as a tuple of everything
_Continue = Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]


class Arrival(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # plain at run time
    """Ends calls of one message with DEADLINE_EXCEEDED if it does not arrive in time, with
    RESOURCE_EXHAUSTED if it is too large, and with INVALID_ARGUMENT if it is none."""

    def __init__(self, timeout_s: float, most_bytes: Mapping[str, int]) -> None:
        """`most_bytes`: by the method's path; 4 MiB for the others."""
        self._timeout_s, self._most_bytes = timeout_s, most_bytes

    async def intercept_service(
        self, continuation: _Continue, details: grpc.HandlerCallDetails
    ) -> Handler:
        handler = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler
        most = self._most_bytes.get(details.method, MESSAGE_BYTES)
        if not handler.response_streaming:
            return self._unary(handler, most)
        return self._streaming(handler, most) if isasyncgenfunction(_plain(handler)) else handler

    def _unary(self, handler: Handler, most: int) -> Handler:
        async def answer(requests: AsyncIterator[bytes], context: Any) -> Any:
            request = await self._message(requests, context, handler.request_deserializer, most)
            answered = handler.unary_unary(request, context)
            return await answered if isawaitable(answered) else answered

        return grpc.stream_unary_rpc_method_handler(answer, None, handler.response_serializer)

    def _streaming(self, handler: Handler, most: int) -> Handler:
        async def answers(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
            request = await self._message(requests, context, handler.request_deserializer, most)
            async with aclosing(handler.unary_stream(request, context)) as messages:
                async for message in messages:
                    yield message

        return grpc.stream_stream_rpc_method_handler(answers, None, handler.response_serializer)

    async def _message(
        self,
        requests: AsyncIterator[bytes],
        context: Any,
        deserializer: Callable[[bytes], Any] | None,
        most: int,
    ) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                data = await anext(aiter(requests))
        except TimeoutError:
            problem = f"the call's message did not arrive within {self._timeout_s:g} s"
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, problem)
        except StopAsyncIteration:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message")
        if len(data) > most:
            problem = f"a message of {len(data)} bytes; this method takes at most {most}"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, problem)
        try:
            return deserializer(data) if deserializer else data
        except DecodeError as error:
            problem = f"the call's message is not one of this method: {error}"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)


def _plain(handler: Handler) -> Any:
    """The function behind a bound method."""
    return getattr(handler.unary_stream, "__func__", handler.unary_stream)
