"""Bad input to every call: the status, the field it names, and a server that serves on."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import grpc
import pytest

from ibtree.weights.manifest import CHUNK_BYTES, WeightManifest
from ibtree.wire.messages import manifest_to_proto
from ibtree.wire.v1 import queue_pb2, sampling_pb2, tree_pb2, weights_pb2, weights_pb2_grpc
from tests.server_ext.site import CONTEXT, DEFAULTS, MAX_TRAJECTORIES, Site
from tests.server_ext.versions import version_of

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NAN = float("nan")
LONG = "x" * 100_000


@pytest.fixture
async def site(tmp_path):
    async with Site(tmp_path) as site:
        yield site


async def refused(call: Any, code: grpc.StatusCode, *words: str) -> None:
    """The awaited call ends with the code and says the words."""
    with pytest.raises(grpc.RpcError) as caught:
        await call
    details = caught.value.details() or ""
    assert caught.value.code() is code, f"{caught.value.code()}: {details[:300]}"
    for word in words:
        assert word in details, details[:300]


def options(**fields: Any) -> Callable[[sampling_pb2.Prompt], None]:
    return lambda prompt: prompt.options.MergeFrom(tree_pb2.TreeOptions(**fields))


def sampling(**fields: Any) -> Callable[[sampling_pb2.Prompt], None]:
    return options(sampling=tree_pb2.SamplingOptions(**fields))


def field(**fields: Any) -> Callable[[sampling_pb2.Prompt], None]:
    return lambda prompt: prompt.MergeFrom(sampling_pb2.Prompt(**fields))


def token_ids(*ids: int) -> Callable[[sampling_pb2.Prompt], None]:
    return field(token_ids=sampling_pb2.TokenIds(ids=ids))


def chat(*turns: tuple[str, str]) -> Callable[[sampling_pb2.Prompt], None]:
    messages = [sampling_pb2.ChatMessage(role=role, content=text) for role, text in turns]
    return lambda prompt: prompt.chat.CopyFrom(sampling_pb2.Chat(messages=messages))


MOST_TOKENS = CONTEXT - DEFAULTS.sampling.max_new_tokens - 1
BAD_PROMPTS: dict[str, tuple[Callable[[sampling_pb2.Prompt], Any], tuple[str, ...]]] = {
    "no content": (lambda p: p.ClearField("text"), ("prompt: empty",)),
    "empty text": (lambda p: setattr(p, "text", ""), ("prompt: empty",)),
    "no ids": (token_ids(), ("prompt: empty",)),
    "outside": (token_ids(5, 263), ("prompt.token_ids", "263", "0 to 262")),
    "far outside": (token_ids(2**32 - 1), ("prompt.token_ids", "4294967295")),
    "too long": (field(text="x" * CONTEXT), ("prompt: ", f"at most {MOST_TOKENS}")),
    "too long by far": (field(text="x" * 5 * CONTEXT + "x"), ("prompt: ", "characters")),
    "no room for what is asked": (
        lambda p: (setattr(p, "text", "x" * MOST_TOKENS), sampling(max_new_tokens=65)(p)),
        ("prompt: ", f"at most {MOST_TOKENS - 1}"),
    ),
    "min_p": (sampling(min_p=1.0), ("sampling.min_p", "[0, 1)")),
    "step rule": (options(step_rule="words"), ("step_rule", "text | auto")),
    "separator": (options(separators=["", "x"]), ("separators: characters", "[1, 256]")),
    "step tokens": (options(max_step_tokens=-1), ("max_step_tokens", "[0, 1048576]")),
    "seed": (options(seed=2**63), ("seed", "9223372036854775807")),
    "no room": (sampling(max_new_tokens=CONTEXT), ("max_new_tokens",)),
    "no messages": (chat(), ("prompt.chat.messages", "at least one")),
    "no role": (chat(("user", "What?"), ("", "x")), ("prompt.chat.messages[1].role",)),
    "stop": (sampling(stop=["", "x"]), ("sampling.stop: characters", "[1, 256]")),
    "stops": (sampling(stop=["x"] * 17), ("sampling.stop: texts", "got 17")),
    "stop ids": (sampling(stop_token_ids=[1] * 65), ("sampling.stop_token_ids", "got 65")),
    "stop id": (sampling(stop_token_ids=[263]), ("sampling.stop_token_ids", "263", "0 to 262")),
    "max_trajectories": (options(max_trajectories=0), ("max_trajectories",)),
    "long id": (field(id="x" * 257), ("prompt.id", "256")),
    "no answer": (lambda p: p.ClearField("answer"), ("answer", "'exact'")),
    "blank answer": (lambda p: setattr(p, "answer", " \n"), ("answer",)),
    "grader": (field(grader="nope"), ("grader", "'nope'", "exact")),
    "strategy": (options(strategy="nope"), ("strategy", "'nope'", "ib | ib_budget | independent")),
    "empty strategy": (options(strategy=""), ("strategy",)),
    "schedule": (options(schedule="nope"), ("schedule", "'nope'", "rounds")),
    "estimator": (options(value_estimator="nope"), ("value_estimator", "mean | backup")),
    "confidence": (options(confidence="nope"), ("confidence", "geometric")),
    "long strategy": (options(strategy=LONG), ("strategy",)),
    "long grader": (field(grader=LONG), ("grader",)),
    "very long id": (field(id=LONG), ("prompt.id",)),
    "too many": (
        options(rounds=MAX_TRAJECTORIES),
        ("options.rounds", f"at most {MAX_TRAJECTORIES}"),
    ),
    "far too many": (
        options(rounds=4096, branch_nodes=4096, branch_rollouts=4096),
        ("options.rounds", "trajectories"),
    ),
    "beta 0": (options(beta=0.0), ("beta",)),
    "beta nan": (options(beta=NAN), ("beta", "nan")),
    "beta inf": (options(beta=float("inf")), ("beta",)),
    "ratio": (options(zero_value_ratio=-0.1), ("zero_value_ratio",)),
    "ratio nan": (options(zero_value_ratio=NAN), ("zero_value_ratio",)),
    "deadline 0": (options(deadline_s=0.0), ("deadline_s",)),
    "deadline nan": (options(deadline_s=NAN), ("deadline_s",)),
    "deadline inf": (options(deadline_s=float("inf")), ("deadline_s",)),
    "budget": (options(max_generated_tokens=0), ("max_generated_tokens",)),
    "temperature": (sampling(temperature=NAN), ("sampling.temperature", "nan")),
    "temperature 0": (sampling(temperature=0.0), ("sampling.temperature",)),
    "temperature -1": (sampling(temperature=-1.0), ("sampling.temperature",)),
    "temperature inf": (sampling(temperature=float("inf")), ("sampling.temperature",)),
    "top_p": (sampling(top_p=1.5), ("sampling.top_p",)),
    "top_p 0": (sampling(top_p=0.0), ("sampling.top_p",)),
    "top_p nan": (sampling(top_p=NAN), ("sampling.top_p",)),
    "top_k": (sampling(top_k=0), ("sampling.top_k",)),
    "top_k -2": (sampling(top_k=-2), ("sampling.top_k",)),
    "tokens": (sampling(max_new_tokens=0), ("sampling.max_new_tokens",)),
    "tokens max": (sampling(max_new_tokens=2**31 - 1), ("max_new_tokens",)),
} | {
    f"{name} {number}": (options(**{name: number}), (name, str(number)))
    for name in ("init_rollouts", "rounds", "branch_nodes", "branch_rollouts")
    for number in (0, -1, -(2**31), 2**31 - 1)
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
async def test_a_bad_prompt_is_refused_by_both_calls(site, name):
    spoil, words = BAD_PROMPTS[name]
    bad = sampling_pb2.Prompt(id="bad", text="What?", answer="1")
    spoil(bad)
    sample = site.raw_sampling.SampleTree(sampling_pb2.SampleTreeRequest(prompt=bad))
    await refused(sample.read(), INVALID, *words)
    good = sampling_pb2.Prompt(id="good", text="What?", answer="1")
    submit = sampling_pb2.SubmitPromptsRequest(prompts=[good, bad])
    await refused(site.raw_sampling.SubmitPrompts(submit), INVALID, *words)
    assert not site.engine.requests
    stats = await site.client.queue_stats()
    assert not any(vars(stats).values()), "something was queued"
    await site.still_serves()


async def test_the_longest_prompt_is_taken(site):
    longest = sampling_pb2.Prompt(text="x" * MOST_TOKENS, answer="1")
    call = site.raw_sampling.SampleTree(sampling_pb2.SampleTreeRequest(prompt=longest))
    assert [message async for message in call][-1].HasField("tree")


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], ("prompts", "1 to 10000")),
        ([f"{i}" for i in range(10_001)], ("prompts", "got 10001")),
        (["a", "b", "a"], ("prompts[2].id", "'a'", "twice")),
        (["a", ""], ("prompts[1].id", "empty")),
        ([LONG, LONG], ("id",)),
    ],
)
async def test_bad_batches(site, ids, words):
    prompts = [sampling_pb2.Prompt(id=i, text="What?", answer="1") for i in ids]
    call = site.raw_sampling.SubmitPrompts(sampling_pb2.SubmitPromptsRequest(prompts=prompts))
    await refused(call, INVALID, *words)
    await site.still_serves()


LEASE, EXTEND = queue_pb2.LeaseTreesRequest, queue_pb2.ExtendLeaseRequest


@pytest.mark.parametrize(
    ("request_", "word"),
    [(LEASE(max_trees=n), "max_trees") for n in (0, -1, -(2**31), 1025, 2**31 - 1)]
    + [(LEASE(max_trees=1, lease_s=s), "lease_s") for s in (0.0, -1.0, 86401.0, NAN)]
    + [(LEASE(max_trees=1, wait_s=s), "wait_s") for s in (-1.0, 601.0, NAN, float("inf"))]
    + [(EXTEND(lease_s=s), "lease_s") for s in (0.0, -1.0, 86401.0, NAN, float("inf"))],
)
async def test_lease_parameters_out_of_range(site, request_, word):
    queue = site.raw_queue
    method = queue.LeaseTrees if isinstance(request_, LEASE) else queue.ExtendLease
    await refused(method(request_), INVALID, word)


@pytest.mark.parametrize("lease_id", ["", "nope", "0" * 32, "\0", "é", LONG])
async def test_an_unknown_lease_is_not_found(site, lease_id):
    words = () if lease_id in ("\0", LONG) else (repr(lease_id),)
    for method, request in (
        (site.raw_queue.AckTrees, queue_pb2.AckTreesRequest),
        (site.raw_queue.NackTrees, queue_pb2.NackTreesRequest),
        (site.raw_queue.ExtendLease, EXTEND),
    ):
        await refused(method(request(lease_ids=[lease_id])), grpc.StatusCode.NOT_FOUND, *words)
    await site.still_serves()


async def exchange(site: Site, *parts: weights_pb2.PushWeightsRequest) -> None:
    """The channel is synchronous: the other sort may report its failed write, not the status."""
    with grpc.insecure_channel(site.target) as channel:
        call = weights_pb2_grpc.WeightsServiceStub(channel).PushWeights(iter(parts))
        await asyncio.to_thread(list, call)


def chunk(data: bytes, offset: int = 0, crc32: int | None = None) -> weights_pb2.PushWeightsRequest:
    crc32 = zlib.crc32(data) if crc32 is None else crc32
    part = weights_pb2.WeightChunk(offset=offset, data=data, crc32=crc32)
    return weights_pb2.PushWeightsRequest(chunk=part)


async def push(site: Site, manifest, *chunks: bytes, first: bool = True) -> None:
    at = [0, *accumulate(map(len, chunks))]
    parts = [chunk(data, offset) for data, offset in zip(chunks, at, strict=False)]
    if manifest is not None:
        part = weights_pb2.PushWeightsRequest(manifest=manifest_to_proto(manifest))
        parts.insert(0 if first else 1, part)
    await exchange(site, *parts)


@pytest.fixture
def version(site):
    return version_of(site.weights.folder, 5)


async def unharmed(site: Site, version) -> None:
    """The served version is as it was; the right push goes through."""
    site.weights.check(0)
    assert (await site.client.get_weights()).version == 0
    await site.client.push_weights(version.manifest, version.path)
    site.weights.check(5)


async def test_a_push_without_a_manifest(site, version):
    data = version.path.read_bytes()
    await refused(push(site, None), INVALID, "manifest")
    await refused(push(site, None, data), INVALID, "manifest")
    await refused(push(site, version.manifest, data, first=False), INVALID, "manifest")
    await refused(exchange(site, weights_pb2.PushWeightsRequest()), INVALID, "manifest")
    await unharmed(site, version)


async def test_bad_chunks(site, version):
    data = version.path.read_bytes()
    await refused(
        push(site, version.manifest, bytes(CHUNK_BYTES + 1)), INVALID, "chunk", f"{CHUNK_BYTES}"
    )
    await refused(push(site, version.manifest), INVALID, "chunk", "0 bytes")
    await refused(push(site, version.manifest, data[:-1]), INVALID, "chunk")
    await refused(push(site, version.manifest, data, b"\0"), INVALID, "chunk")
    again = weights_pb2.PushWeightsRequest(manifest=manifest_to_proto(version.manifest))
    await refused(exchange(site, again, again), INVALID, "chunk")
    await refused(exchange(site, again, chunk(b"")), INVALID, "chunk", "0 bytes")
    for offset in (-1, 1, 2**62):
        await refused(exchange(site, again, chunk(data, offset)), INVALID, "chunk.offset")
    damaged = exchange(site, again, chunk(data, crc32=1))
    await refused(damaged, grpc.StatusCode.UNAVAILABLE, "byte 0", "damaged")
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    await refused(push(site, version.manifest, flipped), INVALID, "digest")
    twice = exchange(site, again, chunk(data[:9]), chunk(data[:9]))
    await refused(twice, INVALID, "chunk.offset", "9")
    outside = weights_pb2.PushWeightsRequest(
        manifest=manifest_to_proto(version.manifest), shared_path="/etc/passwd"
    )
    await refused(exchange(site, outside), grpc.StatusCode.FAILED_PRECONDITION, "--shared-dir")
    await unharmed(site, version)


def first_tensor(**changes: Any) -> Callable[[WeightManifest], dict[str, Any]]:
    return lambda m: {"tensors": (replace(m.tensors[0], **changes), *m.tensors[1:])}


MISFITS: dict[str, tuple[Callable[[WeightManifest], dict[str, Any]], str]] = {
    "model": (lambda m: {"model_id": "nope"}, "model_id"),
    "long model": (lambda m: {"model_id": LONG}, "model_id"),
    "version": (lambda m: {"version": 0}, "version"),
    "delta": (lambda m: {"base_version": 0}, "base_version"),
    "no tensors": (lambda m: {"tensors": ()}, "'model.a' is missing"),
    "one less": (lambda m: {"tensors": m.tensors[1:]}, "'model.a' is missing"),
    "one more": (lambda m: {"tensors": (*m.tensors, m.tensors[0])}, "twice"),
    "name": (first_tensor(name="z"), "'z' is not in the model"),
    "long name": (first_tensor(name=LONG), "tensors"),
    "dtype": (first_tensor(dtype="F64"), "dtype F64"),
    "long dtype": (first_tensor(dtype=LONG), "dtype"),
    "shape": (first_tensor(shape=(-1, 2**62)), "shape"),
    "long shape": (first_tensor(shape=(1,) * 50_000), "shape"),
}


@pytest.mark.parametrize("name", MISFITS)
async def test_pushes_that_do_not_fit(site, version, name):
    changes, word = MISFITS[name]
    manifest = replace(version.manifest, **changes(version.manifest))
    call = push(site, manifest, version.path.read_bytes())
    await refused(call, grpc.StatusCode.FAILED_PRECONDITION, word)
    assert (await site.client.get_weights()).state == "rejected"
    await unharmed(site, version)


@pytest.mark.parametrize("size", [-(2**63), -1, 0, 2**62])
async def test_absurd_sizes(site, version, size):
    call = push(site, replace(version.manifest, file_bytes=size), version.path.read_bytes())
    await refused(call, INVALID, "manifest.file_bytes")
    await unharmed(site, version)
