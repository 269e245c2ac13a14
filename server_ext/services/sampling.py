"""TreeSamplingService: grow a tree now, or queue prompts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from ibtree.errors import FieldError
from ibtree.messages import Expansion
from ibtree.tree import Tree
from ibtree.wire.messages import expansion_to_proto, progress_to_proto, prompt_from_proto
from ibtree.wire.trees import tree_to_proto
from ibtree.wire.unparsed import UnparsedPrompts
from ibtree.wire.v1 import sampling_pb2 as pb
from ibtree.wire.v1 import sampling_pb2_grpc
from server_ext.errors import BusyError, QueueFullError, StoppingError
from server_ext.queue.journal import Journal
from server_ext.queue.journal_thread import JournalThread
from server_ext.queue.producer import Producer
from server_ext.services.statuses import reported
from server_ext.trees.forest import Forest
from server_ext.trees.job import Job

_MAX_PROMPTS = 10_000
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
        self.interactive = 0
        """Trees growing for SampleTree calls now."""
        self._growths: dict[asyncio.Task[Tree], Job] = {}
        self._stopping = False

    def add_to(self, server: Any) -> None:
        sampling_pb2_grpc.add_TreeSamplingServiceServicer_to_server(self, server)
        submit = grpc.unary_unary_rpc_method_handler(
            self.SubmitPrompts,
            request_deserializer=UnparsedPrompts.FromString,
            response_serializer=pb.SubmitPromptsResponse.SerializeToString,
        )
        service = pb.DESCRIPTOR.services_by_name["TreeSamplingService"].full_name
        server.add_registered_method_handlers(service, {"SubmitPrompts": submit})

    def stop_taking(self) -> None:
        """No tree begins any more; calls whose trees have not begun end with UNAVAILABLE."""
        self._stopping = True
        for growth, job in self._growths.items():
            if not self._forest.has_begun(job):
                growth.cancel()

    async def SampleTree(
        self, request: pb.SampleTreeRequest, context: Any
    ) -> AsyncIterator[pb.SampleTreeResponse]:
        async with reported(context):
            job = await self._forest.off_loop(self._job, request.prompt)
            job = replace(job, include_text=request.include_text, urgent=True)
            async for message in self._events(job, tree_only=request.tree_only):
                yield message

    async def _events(self, job: Job, *, tree_only: bool) -> AsyncIterator[pb.SampleTreeResponse]:
        arrived = time.time()
        events: asyncio.Queue[pb.SampleTreeResponse | None] = asyncio.Queue()

        def emit(event: Expansion) -> None:
            if not tree_only:
                events.put_nowait(pb.SampleTreeResponse(expansion=expansion_to_proto(event)))

        async def grow() -> Tree:
            if self._stopping:
                raise StoppingError
            async with self._forest.calls.permit():
                return await self._forest.grow(job, emit, arrived)

        growth = asyncio.create_task(grow())
        self._growths[growth] = job
        growth.add_done_callback(lambda _: events.put_nowait(None))
        self.interactive += 1
        try:
            while True:
                try:
                    event = await asyncio.wait_for(events.get(), _PROGRESS_S)
                except TimeoutError:  # quiet connections are taken for dead, by proxies and people
                    progress = self._forest.progress(job, arrived)
                    event = pb.SampleTreeResponse(progress=progress_to_proto(progress))
                if event is None:
                    break
                yield event
            if growth.cancelled():  # by stop_taking: before the end of the stream nobody else does
                raise StoppingError
            text = self._forest.text if job.include_text else None
            tree = await self._forest.off_loop(tree_to_proto, growth.result(), text)
            yield pb.SampleTreeResponse(tree=tree)
        finally:  # also when the caller cancels: its rollouts are aborted
            self.interactive -= 1
            del self._growths[growth]
            growth.cancel()
            await asyncio.wait({growth})

    async def SubmitPrompts(self, request: Any, context: Any) -> pb.SubmitPromptsResponse:
        """`request`: UnparsedPrompts."""
        async with reported(context):
            most = min(_MAX_PROMPTS, self._max_queued)
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
                raise BusyError(str(error), self._forest.pace.expected_s(error.excess)) from error
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
