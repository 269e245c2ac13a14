"""Evaluations through a real gRPC server: samples, limits, failures, restarts, kills."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from ibtree.client import RpcFailed
from ibtree.data.questions import read_questions
from ibtree.errors import FieldError
from ibtree.evaluation import run
from ibtree.evaluation.accuracy import Accuracy
from ibtree.evaluation.run import evaluate_async
from ibtree.messages import Chat, ChatMessage, Prompt
from ibtree.tree import Finish
from ibtree.wire.v1 import weights_pb2_grpc
from server_ext.services.weights import WeightsService
from tests.data import data
from tests.server_ext.fakes import toy_text, until
from tests.server_ext.site import Site

OPTIONS = {"temperature": 1.0, "max_new_tokens": 64}
PROMPTS = [Prompt(f"{n}?", answer="1") for n in range(40)]


@pytest.fixture
async def site(tmp_path):
    async with Site(tmp_path, max_calls=64) as site:
        yield site


async def evaluated(
    site: Site, prompts=PROMPTS, options=OPTIONS, expected=(), **choices
) -> Accuracy:
    """`expected`: the lines it tells."""
    told: list[str] = []
    accuracy = await evaluate_async(site.target, prompts, options, tell=told.append, **choices)
    assert told == list(expected)
    return accuracy


def rewards(prompt: Prompt, samples: int) -> list[float]:
    """Of what the fake engine writes for a prompt."""
    texts = [toy_text(tuple(prompt.content.encode()), number) for number in range(samples)]
    return [float(text.endswith("#### 1")) for text in texts]


@pytest.mark.parametrize("samples", [1, 8])
async def test_samples_of_a_problem_are_one_tree(site, samples):
    counts: list[tuple[int, int]] = []
    accuracy = await evaluated(site, samples=samples, progress=lambda *now: counts.append(now))
    expected = [rewards(prompt, samples) for prompt in PROMPTS]
    assert accuracy.mean == pytest.approx(sum(map(sum, expected)) / samples / 40)
    assert accuracy.pass_at_n == sum(map(max, expected)) / 40
    assert 0 < accuracy.low < accuracy.mean < accuracy.high < 1
    assert (accuracy.problems, accuracy.samples, accuracy.failed) == (40, samples, 0)
    assert (accuracy.temperature, accuracy.max_new_tokens) == (1.0, 64)
    assert accuracy.truncated == 0 and accuracy.seconds > 0
    assert counts == [(done, 40) for done in range(41)]
    assert len(site.engine.requests) == 40 * samples
    assert len({request.split("/")[0] for request in site.engine.requests}) == 40, "40 trees"


async def test_rollouts_that_are_cut_off_are_counted(site):
    site.engine.write = lambda ids, number: "x" * 100 if number % 2 else "#### 1"
    accuracy = await evaluated(site, samples=4)
    assert (accuracy.truncated, accuracy.mean, accuracy.pass_at_n) == (80, 0.5, 1.0)
    accuracy = await evaluated(site, options={"max_new_tokens": 200}, samples=4)
    assert accuracy.truncated == 0 and accuracy.max_new_tokens == 200


async def test_limits_left_out_are_the_servers(site):
    accuracy = await evaluated(site, options={})
    assert (accuracy.temperature, accuracy.max_new_tokens) == (1.0, 64)


async def test_problems_that_fail_are_kept_apart(site):
    bad = [Prompt("x" * 600, answer="1"), Prompt("y", answer="1", grader="nobody")]
    accuracy = await evaluated(site, [*PROMPTS[:5], *bad, *PROMPTS[5:]])
    assert (accuracy.problems, accuracy.failed) == (40, 2)
    assert accuracy.mean == sum(rewards(prompt, 1)[0] for prompt in PROMPTS) / 40
    assert "INVALID_ARGUMENT: prompt: 600 tokens" in accuracy.first_failure or (
        "INVALID_ARGUMENT: grader" in accuracy.first_failure
    )
    with pytest.raises(RpcFailed, match=r"prompt: 600 tokens"):
        await evaluated(site, bad[:1])
    with pytest.raises(FieldError, match="prompts: none"):
        await evaluated(site, [])


async def test_more_samples_than_the_server_lets_grow(site):
    with pytest.raises(RpcFailed, match=r"at most 40 \(the server's --limit-trajectories\)"):
        await evaluated(site, samples=41)


async def test_rollouts_that_are_missing_are_a_failure(site):
    with pytest.raises(FieldError, match=r"samples: 2 of 4 rollouts finished \(MAX_TRAJECTORIES\)"):
        await evaluated(site, options={"max_trajectories": 2}, samples=4)


async def test_conversations(site):
    asked = Prompt(Chat((ChatMessage("user", "3?"),), {"think": False}), answer="1")
    texts = toy_text(site.tokenizer.encode("[user]3?"), 0)
    assert (await evaluated(site, [asked])).mean == float(texts.endswith("#### 1"))


async def test_seeds(site):
    await evaluated(site, samples=3, seed=5)
    first = sorted(site.engine.seeds)
    site.engine.seeds.clear()
    await evaluated(site, PROMPTS[::-1], samples=3, seed=5)
    assert sorted(site.engine.seeds) == first and len(set(first)) == 120


# --- a server that goes away, an evaluation that is killed ---------------------------------------


async def restarted(site: Site) -> None:
    """The same services at the same address."""
    site.server = grpc.aio.server()
    site.sampling.add_to(site.server)
    service = WeightsService(site.updater, None)
    weights_pb2_grpc.add_WeightsServiceServicer_to_server(service, site.server)
    site.server.add_insecure_port(site.target)
    await site.server.start()


def hanging_after(site: Site, count: int) -> asyncio.Event:
    """Rollouts of the prompts from number `count` on wait for the event."""
    go_on, generate = asyncio.Event(), site.engine.generate

    async def hanging(rid, token_ids, *request, **more):
        if int(bytes(token_ids)[:-1]) >= count:
            await go_on.wait()
        return await generate(rid, token_ids, *request, **more)

    site.engine.generate = hanging
    return go_on


@pytest.mark.parametrize("away_s", [0.0, 6.0])
async def test_a_server_that_restarts_loses_nothing(site, away_s):
    done: list[int] = []
    go_on = hanging_after(site, 20)
    evaluation = asyncio.create_task(
        evaluated(site, samples=2, progress=lambda now, _: done.append(now))
    )
    await until(lambda: done and done[-1] == 20)
    await site.server.stop(0)
    await asyncio.sleep(away_s)
    go_on.set()
    await restarted(site)
    accuracy = await asyncio.wait_for(evaluation, 60)
    assert (accuracy.problems, accuracy.failed) == (40, 0)
    assert accuracy.mean == sum(sum(rewards(prompt, 2)) for prompt in PROMPTS) / 80


async def test_a_server_that_stays_away_ends_it_and_what_is_finished_stays(site, tmp_path):
    path = tmp_path / "finished.jsonl"
    hanging_after(site, 20)
    done: list[int] = []
    evaluation = asyncio.create_task(
        evaluated(site, resume=path, patience_s=1.0, progress=lambda now, _: done.append(now))
    )
    await until(lambda: done and done[-1] == 20)
    await site.server.stop(0)
    with pytest.raises(RpcFailed, match="UNAVAILABLE"):
        await evaluation
    assert len(path.read_text().splitlines()) == 20
    with pytest.raises(RpcFailed, match="no server answers there"):
        await evaluated(site)  # it must be there at the start
    assert len(path.read_text().splitlines()) == 20


async def test_a_problem_that_no_server_survives_fails_alone(site):
    """The others come through meanwhile."""
    generate = site.engine.generate

    async def lost(rid, token_ids, *request, **more):
        completion = await generate(rid, token_ids, *request, **more)
        if bytes(token_ids) == b"7?":
            return type(completion)((), (), (), Finish.NONE, 1, 0)
        await asyncio.sleep(float(bytes(token_ids)[:-1]) / 10)
        return completion

    site.engine.generate = lost
    accuracy = await evaluated(site, patience_s=2.5)  # others end every 0.1 s for 4 s
    assert (accuracy.problems, accuracy.failed) == (39, 1)
    assert "UNAVAILABLE" in accuracy.first_failure and "gave up" in accuracy.first_failure


async def test_an_evaluation_that_was_killed_goes_on(site, tmp_path):
    path = tmp_path / "finished.jsonl"
    whole = await evaluated(site, samples=2, resume=path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:15]) + lines[15][:30])
    site.engine.requests.clear()
    done: list[tuple[int, int]] = []
    again = await evaluated(
        site,
        samples=2,
        resume=path,
        progress=lambda *now: done.append(now),
        expected=[f"15 of 40 problems were finished before, in {path}"],
    )
    assert done[0] == (15, 40) and done[-1] == (40, 40)
    assert len(site.engine.requests) == 50
    assert (again.mean, again.pass_at_n, again.low) == (whole.mean, whole.pass_at_n, whole.low)
    site.engine.requests.clear()
    await evaluated(site, options={**OPTIONS, "temperature": 0.5}, samples=2, resume=path)
    assert len(site.engine.requests) == 80, "other settings: nothing of it is finished"


async def test_weights_that_change_meanwhile_are_told(site, tmp_path):
    path, done = tmp_path / "finished.jsonl", []
    go_on = hanging_after(site, 20)
    lines = ["the weights changed meanwhile: versions 0 to 3"]
    evaluation = asyncio.create_task(
        evaluated(site, resume=path, progress=lambda now, _: done.append(now), expected=lines)
    )
    await until(lambda: done and done[-1] == 20)
    site.engine._took("3.1")
    go_on.set()
    assert (await evaluation).problems == 40
    assert len(path.read_text().splitlines()) == 20, "those of the weights it began with"


async def test_gsm8k_takes_64_problems_at_a_time(site, monkeypatch):
    questions = read_questions(data("gsm8k/test.jsonl"))
    site.engine.write = lambda ids, number: f"#### {number}"
    site.engine.context_tokens = 4096
    prompts = [Prompt(q.prompt, answer=q.answer) for q in questions]
    most, calls = 0, run.AsyncClient.sample_tree

    running = 0

    async def counted(client, *words, **more):
        nonlocal most, running
        running += 1
        most = max(most, running)
        try:
            return await calls(client, *words, **more)
        finally:
            running -= 1

    monkeypatch.setattr(run.AsyncClient, "sample_tree", counted)
    began = time.monotonic()
    accuracy = await evaluated(site, prompts, samples=8)
    print(f"{time.monotonic() - began:.1f} s")
    assert (accuracy.problems, most) == (1319, 64)
    right = [q for q in questions if q.answer in map(str, range(8))]
    assert accuracy.mean == pytest.approx(len(right) / 8 / 1319)
    assert accuracy.pass_at_n == pytest.approx(len(right) / 1319)
