"""Any request at all: a job, or an error that names a field; never anything else."""

from __future__ import annotations

import asyncio

from google.protobuf.descriptor import FieldDescriptor
from hypothesis import given, settings
from hypothesis import strategies as st

from ibtree.errors import FieldError
from ibtree.wire.messages import prompt_from_proto
from ibtree.wire.v1 import queue_pb2, sampling_pb2
from server_ext.trees.limits import Limits
from server_ext.trees.sampler import Job
from tests.server_ext.site import CONTEXT, DEFAULTS, Site

TEXTS = st.sampled_from(["", "1", "exact", "ib", "mean", "eager", "é\0", "x" * 600]) | st.text()
EDGES = [0, 1, -1, 2, 3, 7, 262, 263, 4096, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63)]
DOUBLES = st.sampled_from([0.0, -0.0, 1.0, 0.5, 1e-300, 1e300, float("nan"), float("inf")])
RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def values(field: FieldDescriptor) -> st.SearchStrategy:
    if field.message_type:
        return messages(field.message_type._concrete_class)
    if field.cpp_type in RANGES:
        low, high = RANGES[field.cpp_type]
        inside = [edge for edge in EDGES if low <= edge <= high]
        return st.sampled_from(inside) | st.integers(1, 12)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return TEXTS
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    return DOUBLES | st.floats(-2, 120)


@st.composite
def messages(draw, kind):
    """Any message of the kind: about half of the fields, at most one of a oneof."""
    message = kind()
    for field in kind.DESCRIPTOR.fields:
        if not draw(st.booleans()):
            continue
        if field.message_type and field.message_type.GetOptions().map_entry:
            getattr(message, field.name).update(draw(st.dictionaries(TEXTS, TEXTS, max_size=4)))
        elif field.is_repeated:
            for value in draw(st.lists(values(field), max_size=4)):
                getattr(message, field.name).append(value)
        elif field.message_type:
            getattr(message, field.name).CopyFrom(draw(values(field)))
        else:
            setattr(message, field.name, draw(values(field)))
    return message


def job_of(site: Site, message: sampling_pb2.Prompt) -> Job | None:
    try:
        return site.forest.check(prompt_from_proto(message, DEFAULTS))
    except FieldError as error:
        assert error.field and error.problem and error.allowed
        return None


def test_any_prompt_is_a_job_or_names_a_field(tmp_path):
    site = Site(tmp_path, limits=Limits(40, 100, 50.0, 1000.0))
    outcomes = {True: 0, False: 0}

    @settings(max_examples=600, deadline=None)
    @given(messages(sampling_pb2.Prompt))
    def check(message):
        job = job_of(site, message)
        outcomes[job is not None] += 1
        if job:
            options = job.options
            assert 1 <= options.trajectories <= 40
            assert 0 < options.deadline_s <= 1000.0
            assert 0 < len(job.token_ids) < CONTEXT - options.sampling.max_new_tokens
            assert all(0 <= token < 263 for token in job.token_ids)
            assert 0 < options.sampling.temperature <= 50.0
            assert options.sampling.max_new_tokens <= 100

    @settings(max_examples=300, deadline=None)
    @given(messages(sampling_pb2.Prompt))
    def check_nearly_good(message):
        """A good prompt with one field of another."""
        good = sampling_pb2.Prompt(text="What?", answer="1")
        for field, value in message.ListFields()[:1]:
            part = sampling_pb2.Prompt()
            if field.is_repeated or field.message_type:
                getattr(part, field.name).MergeFrom(value)
            else:
                setattr(part, field.name, value)
            good.MergeFrom(part)
        outcomes[job_of(site, good) is not None] += 1

    check()
    check_nearly_good()
    site.journal.close()
    assert min(outcomes.values()) > 20, "both outcomes are seen"


async def test_any_bytes_and_any_request_leave_the_server_serving(tmp_path):
    """Whatever comes through gRPC ends in a status that clients understand."""
    kinds = {
        "sampling": [sampling_pb2.SampleTreeRequest, sampling_pb2.SubmitPromptsRequest],
        "queue": [
            queue_pb2.LeaseTreesRequest,
            queue_pb2.ExtendLeaseRequest,
            queue_pb2.AckTreesRequest,
            queue_pb2.NackTreesRequest,
            queue_pb2.GetQueueStatsRequest,
        ],
    }
    asked: list[tuple[str, bytes]] = []

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def collect(data):
        room = data.draw(st.sampled_from(sorted(kinds)))
        kind = data.draw(st.sampled_from(kinds[room]))
        service = {"sampling": "TreeSamplingService", "queue": "TreeQueueService"}[room]
        method = f"/ibtree.v1.{service}/{kind.__name__.removesuffix('Request')}"
        message = data.draw(messages(kind))
        if kind is queue_pb2.LeaseTreesRequest:
            message.wait_s = -1.0 if message.wait_s > 0 else message.wait_s
        junk = data.draw(st.binary(max_size=40))
        asked.extend([(method, message.SerializeToString()), (method, junk)])

    collect()
    async with Site(tmp_path) as site:

        async def ask(method: str, request: bytes) -> str:
            if method.endswith("SampleTree"):
                stream = site.channel.unary_stream(method)(request, timeout=20)
                return (await stream.code()).name
            return (await site.channel.unary_unary(method)(request, timeout=20).code()).name

        codes = await asyncio.gather(*(ask(*request) for request in asked))
        known = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "DEADLINE_EXCEEDED"}
        messages_end, bytes_end = set(codes[::2]), set(codes[1::2])
        assert messages_end <= known, messages_end
        assert {"OK", "INVALID_ARGUMENT"} <= messages_end
        # gRPC itself says UNKNOWN of bytes that are no message
        assert bytes_end <= known | {"UNKNOWN"}, bytes_end
        await site.still_serves()
