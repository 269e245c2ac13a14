"""Canaries: what the learner computes must be what the server computes, or the version goes."""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import replace

import grpc
import pytest

from ibtree.client import RpcFailed
from ibtree.errors import FieldError
from ibtree.weights.manifest import Canary
from server_ext.errors import CanaryError, EngineError, MixedWeightsError
from tests.server_ext.fakes import FakeEngine, until
from tests.server_ext.site import Site, prompt
from tests.server_ext.versions import Served, Version, load_file, tensors, version_of

IDS = (5, 6, 7, 8, 9)


def canaried(
    version: Version, off: float = 0.0, tolerance: float = 0.1, scored: int = 3
) -> Version:
    """The version with what its own weights give, off by some nats at the last token."""
    learner = FakeEngine()
    learner.weights = load_file(version.whole)
    logprobs = [learner.logprob(IDS[:at], IDS[at]) for at in range(len(IDS) - scored, len(IDS))]
    logprobs[-1] += off
    return replace(version, manifest=version.but(canary=Canary(IDS, tuple(logprobs), tolerance)))


async def push(served: Served, version: Version) -> None:
    await served.updater.push(version.manifest, version.source())


@pytest.fixture(params=["interrupt", "drain"])
async def at_3(tmp_path, request) -> Served:
    served = Served(tmp_path, request.param)
    await served.push(3)
    return served


@pytest.mark.parametrize("off", [0.0, 0.09, -0.09])
async def test_what_agrees_within_the_tolerance_serves(at_3, off):
    await push(at_3, canaried(version_of(at_3.folder, 4), off))
    at_3.check(4)
    assert at_3.engine.tried == [4, 4, 4]


@pytest.mark.parametrize("off", [0.11, -0.11, 50.0, math.nan, math.inf])
async def test_what_does_not_is_taken_back_and_named(at_3, off, caplog):
    caplog.set_level(logging.INFO)
    words = "canary: version 4 gives token 4 .* here, .* in the learner; tolerance 0.1"
    with pytest.raises(CanaryError, match=words):
        await push(at_3, canaried(version_of(at_3.folder, 4), off))
    at_3.check(3)
    assert at_3.updater.state == "rejected"
    assert "weight version 4 was not taken: canary: version 4" in caplog.text
    assert "putting weight version 3 back" in caplog.text
    await at_3.restart()
    at_3.check(3)
    await push(at_3, canaried(version_of(at_3.folder, 4)))
    at_3.check(4)


async def test_an_engine_that_does_not_answer(at_3, monkeypatch):
    async def never(self, prefix, token) -> float:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr("server_ext.weights.canary._DEADLINE_S", 0.05)
    with monkeypatch.context() as patched:
        patched.setattr(FakeEngine, "try_out", never)
        with pytest.raises(EngineError, match=r"version 4 was not scored within 0\.05 s"):
            await push(at_3, canaried(version_of(at_3.folder, 4)))
    at_3.check(3)
    await push(at_3, canaried(version_of(at_3.folder, 4)))
    at_3.check(4)


async def test_a_server_that_computes_not_a_number(at_3, monkeypatch):
    monkeypatch.setattr(FakeEngine, "try_out", answer(math.nan))
    with pytest.raises(CanaryError, match="nan"):
        await push(at_3, canaried(version_of(at_3.folder, 4)))
    at_3.check(3)


def answer(value: float):
    async def try_out(self, prefix, token) -> float:
        return value

    return try_out


async def test_a_trial_that_fails_takes_the_version_back(at_3, monkeypatch):
    async def lost(self, prefix, token) -> float:
        raise EngineError("lost")

    with monkeypatch.context() as patched:
        patched.setattr(FakeEngine, "try_out", lost)
        with pytest.raises(EngineError, match="lost"):
            await push(at_3, canaried(version_of(at_3.folder, 4)))
    at_3.check(3)
    await push(at_3, canaried(version_of(at_3.folder, 4)))
    at_3.check(4)


async def test_a_version_that_can_not_be_taken_back_ends_the_server(at_3):
    at_3.engine.faults.extend([None, EngineError("broken")])
    with pytest.raises(MixedWeightsError):
        await push(at_3, canaried(version_of(at_3.folder, 4), off=9.0))
    assert at_3.updater.broken.is_set()
    await at_3.restart()
    at_3.check(3)


BAD = {
    "nothing scored": {"logprobs": ()},
    "everything scored": {"logprobs": (-1.0,) * 5},
    "more than there is": {"logprobs": (-1.0,) * 6},
    "too many scored": {"token_ids": tuple(range(99)), "logprobs": (-1.0,) * 33},
    "longer than the context": {"token_ids": (1,) * 512},
    "no tolerance": {"tolerance": 0.0},
    "negative tolerance": {"tolerance": -1.0},
    "any tolerance": {"tolerance": math.inf},
    "no number": {"tolerance": math.nan},
}


@pytest.mark.parametrize("name", BAD)
async def test_canaries_that_say_nothing_are_refused_before_a_byte_is_taken(at_3, name):
    version = canaried(version_of(at_3.folder, 4))
    canary = replace(version.manifest.canary, **BAD[name])

    async def none_taken(start: int):
        raise AssertionError("a byte was taken")
        yield b""

    with pytest.raises(FieldError, match=r"manifest\.canary"):
        await at_3.updater.push(version.but(canary=canary), none_taken)
    at_3.check(3)


async def test_no_token_of_a_version_that_was_taken_back_reaches_a_tree(tmp_path):
    """Rollouts are in flight when it is tried out; they are drawn again."""
    async with Site(tmp_path) as site:
        first = version_of(tmp_path, 3)
        await site.client.push_weights(first.manifest, first.path)
        site.engine.go_on.clear()
        trees = [asyncio.create_task(site.client.sample_tree(prompt(id=f"{i}"))) for i in range(3)]
        await until(lambda: len(site.engine.running) == 9)
        tried, go_on = asyncio.Event(), asyncio.Event()
        score = site.engine.try_out

        async def slow(prefix, token) -> float:
            tried.set()
            await go_on.wait()
            return await score(prefix, token)

        site.engine.try_out = slow
        bad = canaried(version_of(tmp_path, 4), off=-9.0)
        push = asyncio.create_task(site.client.push_weights(bad.manifest, bad.path))
        await tried.wait()
        site.engine.go_on.set()  # they end with tokens of version 4, before the verdict
        await until(lambda: not site.engine.running)
        assert not any(tree.done() for tree in trees)
        requests = len(site.engine.requests)
        go_on.set()
        with pytest.raises(RpcFailed, match="canary: version 4") as caught:
            await push
        assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
        for tree in await asyncio.gather(*trees):
            assert {v for step in tree.steps for v in step.versions} == {3}
        assert len(site.engine.requests) > requests
        site.weights.check(3)


async def test_rollouts_beside_a_version_that_is_kept_span_both(tmp_path):
    async with Site(tmp_path) as site:
        site.engine.go_on.clear()
        tree = asyncio.create_task(site.client.sample_tree(prompt()))
        await until(lambda: len(site.engine.running) == 3)
        version = canaried(version_of(tmp_path, 4))
        await site.client.push_weights(version.manifest, version.path)
        site.engine.go_on.set()
        versions = [step.versions for step in (await tree).steps]
        assert {v for of_step in versions for v in of_step} == {0, 4}
        assert len(site.engine.requests) == len(set(site.engine.requests))


def test_the_fake_engine_tells_versions_apart():
    engine = FakeEngine()
    seen = []
    for number in range(6):
        engine.weights = tensors(number)
        seen.append(engine.logprob(IDS[:3], 7))
    assert len(set(seen)) == 6 and all(-5 < logprob <= 0 for logprob in seen)
