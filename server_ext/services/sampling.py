"""TreeSamplingService: grow a tree now, or queue prompts."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from ibtree.errors import FieldError
from ibtree.messages import Expansion
from ibtree.tree.options import check_integer
from ibtree.wire.calls import MOST_PROMPTS
from ibtree.wire.messages import expansion_to_proto, progress_to_proto, prompt_from_proto
from ibtree.wire.parts import tree_messages
from ibtree.wire.unparsed import UnparsedPrompts
from ibtree.wire.v1 import sampling_pb2 as pb
from ibtree.wire.v1 import sampling_pb2_grpc
from server_ext.capacity.shares import Kind
from server_ext.errors import BusyError, QueueFullError, StoppingError
from server_ext.queue.journal import Journal
from server_ext.queue.journal_thread import JournalThread
from server_ext.queue.producer import Producer
from server_ext.services.statuses import reported
from server_ext.trees.forest import Forest
from server_ext.trees.growths import Growths
from server_ext.trees.job import Job

_SLICE = 64
"""Prompts checked in a row: then trees that wait for the same thread have their turn."""
_PROGRESS_S = 10.0
"""Longest silence of a stream."""


class SamplingService(sampling_pb2_grpc.TreeSamplingServiceServicer):
    """See protos/ibtree/v1/sampling.proto."""

    def __init__(
        self, forest: Forest, journal: JournalThread, producer: Producer, max_queued: int
    ) -> None:
        self._forest, self._journal, self._producer = forest, journal, producer
        self._max_queued = max_queued
        self._growths = Growths()
        self._stopping = False

    @property
    def interactive(self) -> int:
        """Trees growing for SampleTree calls now."""
        return self._growths.growing

    async def stop(self) -> None:
        """Ends the trees that grow for SampleTree calls."""
        await self._growths.stop()

    def stop_taking(self) -> None:
        """No tree begins any more; calls whose trees have not begun end with UNAVAILABLE."""
        self._stopping = True
        self._growths.leave_out(self._forest.has_begun)

    def add_to(self, server: Any) -> None:
        sampling_pb2_grpc.add_TreeSamplingServiceServicer_to_server(self, server)
        sample = grpc.unary_stream_rpc_method_handler(
            self.SampleTree,
            request_deserializer=pb.SampleTreeRequest.FromString,
            response_serializer=_serialized,
        )
        submit = grpc.unary_unary_rpc_method_handler(
            self.SubmitPrompts,
            request_deserializer=UnparsedPrompts.FromString,
            response_serializer=pb.SubmitPromptsResponse.SerializeToString,
        )
        service = pb.DESCRIPTOR.services_by_name["TreeSamplingService"].full_name
        own = {"SampleTree": sample, "SubmitPrompts": submit}
        server.add_registered_method_handlers(service, own)

    async def SampleTree(  # type: ignore[override]  # yields the tree's messages as bytes
        self, request: pb.SampleTreeRequest, context: Any
    ) -> AsyncIterator[pb.SampleTreeResponse | bytes]:
        arrived, came_s = time.time(), time.monotonic()
        async with reported(context):
            check_integer("received_expansions", request.received_expansions, 0, 2**31 - 1)
            job = await self._forest.off_loop(self._job, request.prompt)
            deadline_s = job.options.deadline_s
            until = None if deadline_s is None else came_s + deadline_s
            job = replace(job, include_text=request.include_text, kind=Kind.CALL, until=until)
            grow = partial(self._grow, request.tree_only, arrived)
            growth = self._growths.attach(request.call_id, _content(request), job, grow)
            stream = growth.stream
            try:
                events = growth.expansions(stream, request.received_expansions, _PROGRESS_S)
                async for event in events:
                    if event is None:  # quiet connections are taken for dead, by proxies and people
                        progress = self._forest.progress(growth.job, arrived)
                        yield pb.SampleTreeResponse(progress=progress_to_proto(progress))
                    else:
                        yield pb.SampleTreeResponse(expansion=expansion_to_proto(event))
                if growth.task.cancelled():  # by stop_taking
                    raise StoppingError
                for message in growth.task.result():
                    yield message
            finally:
                in_time = context.time_remaining()
                keep = in_time is None or in_time > 0
                await self._growths.detach(growth, stream, keep=keep)

    async def _grow(
        self, tree_only: bool, arrived: float, job: Job, emit: Callable[[Expansion], None]
    ) -> list[bytes]:
        """The stream's last messages."""
        if self._stopping:
            raise StoppingError
        tree = await self._forest.grow_for_call(job, _ignore if tree_only else emit, arrived)
        text = self._forest.text if job.include_text else None
        return await self._forest.off_loop(tree_messages, tree, text)

    async def CancelTree(
        self, request: pb.CancelTreeRequest, context: Any
    ) -> pb.CancelTreeResponse:
        async with reported(context):
            if not request.call_id:
                raise FieldError("call_id", "empty", "the call_id of a SampleTree call")
            await self._growths.cancel(request.call_id)
        return pb.CancelTreeResponse()

    async def SubmitPrompts(self, request: Any, context: Any) -> pb.SubmitPromptsResponse:
        """`request`: UnparsedPrompts."""
        async with reported(context):
            most = min(MOST_PROMPTS, self._max_queued)
            count = len(request.prompts)
            if not 1 <= count <= most:
                raise FieldError("prompts", f"got {count}", f"1 to {most} a call")
            rows: dict[str, bytes] = {}
            for at in range(0, count, _SLICE):
                await self._forest.off_loop(self._add_rows, rows, request, at)
            try:
                accepted, known = await self._journal(
                    Journal.submit, rows.items(), self._max_queued
                )
            except QueueFullError as error:
                raise BusyError(
                    str(error), self._forest.paces[Kind.QUEUED].expected_s(error.excess)
                ) from error
            self._producer.notify()
            return pb.SubmitPromptsResponse(accepted=accepted, known=known)

    def _job(self, prompt: pb.Prompt) -> Job:
        return self._forest.check(prompt_from_proto(prompt, self._forest.defaults))

    def _add_rows(self, rows: dict[str, bytes], request: Any, start: int) -> None:
        """Adds a slice of the prompts as the journal keeps them, by id. Raises FieldError that
        names the first bad one."""
        for i, data in enumerate(request.prompts[start : start + _SLICE], start):
            try:
                prompt = pb.Prompt.FromString(data)
            except DecodeError as error:
                raise FieldError(f"prompts[{i}]", f"no Prompt: {error}", "a Prompt") from error
            if not prompt.id or prompt.id in rows:
                problem = f"{prompt.id!r} is empty or stands twice in the call"
                raise FieldError(f"prompts[{i}].id", problem, "distinct ids")
            try:
                self._job(prompt)
            except FieldError as error:
                where = f"prompts[{i}]: {error.field}"
                raise FieldError(where, error.problem, error.allowed) from error
            rows[prompt.id] = prompt.SerializeToString(deterministic=True)


def _serialized(message: pb.SampleTreeResponse | bytes) -> bytes:
    """A tree's messages are made beside the event loop, as bytes."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def _content(request: pb.SampleTreeRequest) -> bytes:
    """What a call asks for, whichever attempt it is."""
    asked = pb.SampleTreeRequest(
        prompt=request.prompt, include_text=request.include_text, tree_only=request.tree_only
    )
    return asked.SerializeToString(deterministic=True)


def _ignore(_: Expansion) -> None:
    pass
