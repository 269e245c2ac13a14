"""Growing trees through the gRPC services: streams, cancelling, deadlines, failures."""

from __future__ import annotations

import asyncio
import gc
import math
import time

import grpc
import pytest

from ibtree import Client, Tree
from ibtree.client import RpcFailed
from ibtree.messages import Expansion
from ibtree.tree import Finish, StopCause
from ibtree.wire import calls
from ibtree.wire.messages import event_from_proto, prompt_to_proto
from ibtree.wire.v1 import sampling_pb2, sampling_pb2_grpc
from server_ext.errors import EngineError
from tests.server_ext.fakes import until
from tests.server_ext.site import DEFAULTS, Site, prompt
from tests.server_ext.versions import MODEL_ID


@pytest.fixture
async def site(tmp_path):
    async with Site(tmp_path, max_calls=2) as site:
        yield site


async def events(site: Site, **options) -> list[Expansion | Tree]:
    return [e async for e in site.client.sample_events(prompt(**options))]


def check_tree(site: Site, tree: Tree) -> None:
    """What the toy engine writes, cut and graded as it should be."""
    decode = site.tokenizer.decode
    tree.validate()
    for node in tree.end_nodes():
        text = decode(tree.prefix(node), special=False)
        assert decode(tree.prefix(node)) == text + "<eos>"
        assert tree.reward(node) == float(text.rsplit("####")[1].strip() == "1")
        steps = [decode(tree.steps[n].token_ids) for n in tree.path(node)]
        assert steps == [s + "\n\n" for s in text.split("\n\n")[:-1]] + [
            text.split("\n\n")[-1] + "<eos>"
        ]
    for step in tree.steps[1:]:
        assert all(-1.0 <= logprob <= 0.0 for logprob in step.logprobs)


async def test_a_stream_of_expansions_then_the_tree(site):
    *expansions, tree = await events(site, id="mine")
    assert isinstance(tree, Tree)
    assert all(isinstance(e, Expansion) for e in expansions)
    assert [e.trajectories for e in expansions] == list(range(1, DEFAULTS.trajectories + 1))
    assert {e.target_trajectories for e in expansions} == {6}
    assert [e.round for e in expansions] == [1, 1, 1, 2, 3, 4]
    check_tree(site, tree)
    assert (tree.tree_id, tree.model_id, tree.answer) == ("mine", MODEL_ID, "1")
    assert tree.prompt == site.tokenizer.encode("What?")
    assert tree.options == DEFAULTS
    assert tree.stop_cause is StopCause.COMPLETE
    assert tree.first_round_reward == pytest.approx(sum(e.reward for e in expansions[:3]) / 3)
    assert sorted(e.end_node for e in expansions) == sorted(
        n for n in tree.end_nodes() for _ in range(tree.ends[n])
    )
    assert tree.ledger.generated_tokens == sum(e.generated_tokens for e in expansions)
    assert 0 <= tree.ledger.queue_s < 10
    assert 0 < tree.ledger.wall_s < 10


async def test_the_same_by_the_synchronous_client(site):
    def calls():
        with Client(site.target, timeout_s=20) as client:
            *expansions, tree = list(client.sample_events(prompt(id="mine")))
            again = client.sample_tree(prompt(id="mine"))
            return expansions, tree, again

    expansions, tree, again = await asyncio.to_thread(calls)
    assert len(expansions) == 6
    check_tree(site, tree)
    assert (again.parents, again.steps, again.ends) == (tree.parents, tree.steps, tree.ends)


async def test_only_the_tree_if_asked(site):
    request = calls.sample_tree(prompt(id="mine"), include_text=False, tree_only=True).request
    async with grpc.aio.insecure_channel(site.target) as channel:
        call = sampling_pb2_grpc.TreeSamplingServiceStub(channel).SampleTree(request, timeout=20)
        [message] = [message async for message in call]
    check_tree(site, event_from_proto(message))


async def test_options_of_the_call_and_token_ids(site):
    options = {"strategy": "independent", "init_rollouts": 5, "rounds": 1, "max_new_tokens": 7}
    tree = await site.client.sample_tree(prompt(**options))
    assert tree.trajectories == 5
    assert {start for start, n in enumerate(tree.starts) if n} == {0}
    assert all(tree.depth_tokens(n) == 7 for n in tree.end_nodes())
    ids = prompt([87, 0, 256, 262], id="")
    tree = await site.client.sample_tree(ids)
    assert tree.prompt == (87, 0, 256, 262)
    assert len(tree.tree_id) == 32  # the server made one


async def test_a_branch_has_the_tokens_that_its_prefix_left(site):
    tree = await site.client.sample_tree(prompt(rounds=8, max_new_tokens=14))
    assert any(tree.starts[1:])
    assert {tree.depth_tokens(n) for n in tree.end_nodes()} == {14}
    assert {tree.finishes[n] for n in tree.end_nodes()} == {Finish.LENGTH}


async def test_steps_never_span_the_prompt(site):
    """A separator half in the prompt, half generated, closes nothing."""
    site.engine.write = lambda ids, number: "\nso\n\n#### 1"
    tree = await site.client.sample_tree(prompt("What?\n", strategy="independent"))
    steps = [site.tokenizer.decode(step.token_ids) for step in tree.steps[1:]]
    assert steps == ["\nso\n\n", "#### 1<eos>"]


async def test_an_open_tree_counts_as_interactive_and_is_never_leased(site):
    site.engine.go_on.clear()
    call = asyncio.create_task(site.client.sample_tree(prompt(id="mine")))
    await until(lambda: site.engine.running)
    stats = await site.client.queue_stats()
    assert (stats.interactive, stats.growing) == (1, 0)
    site.engine.go_on.set()
    await call
    stats = await site.client.queue_stats()
    assert stats.interactive == stats.graded == 0
    assert await site.client.lease_trees(1) == []


async def hung_call(site: Site, **options) -> grpc.aio.Call:
    """A SampleTree call whose rollouts hang in the engine."""
    site.engine.go_on.clear()
    before = len(site.engine.running)
    request = sampling_pb2.SampleTreeRequest(prompt=prompt_to_proto(prompt(**options)))
    call = site.raw_sampling.SampleTree(request)
    reading = asyncio.ensure_future(call.read())
    await until(lambda: len(site.engine.running) >= before + DEFAULTS.init_rollouts)
    call.reading = reading
    return call


async def test_cancelling_aborts_the_rollouts_and_frees_the_permit(site):
    for _ in range(5):  # more than there are permits
        call = await hung_call(site)
        call.cancel()
        await until(lambda: not site.engine.running)
        await until(lambda: site.sampling.interactive == 0)
    assert site.forest.calls.growing == 0
    site.engine.go_on.set()
    await site.still_serves()


async def test_cancelling_in_the_middle_of_the_stream(site):
    written = site.engine.write

    def write(ids, number):
        if number == 5:
            site.engine.go_on.clear()
        return written(ids, number)

    site.engine.write = write
    stream = site.client.sample_events(prompt(rounds=30))
    seen = 0
    async for _ in stream:
        seen += 1
        if seen == 4:
            break
    await until(lambda: site.engine.running)
    await stream.aclose()
    await until(lambda: not site.engine.running and not site.sampling.interactive)
    await until(lambda: site.forest.calls.growing == 0)
    site.engine.write = written
    site.engine.go_on.set()
    await site.still_serves()


async def test_cancelling_leaves_no_task_behind(site, caplog):
    call = await hung_call(site)
    call.cancel()
    await until(lambda: site.sampling.interactive == 0)
    gc.collect()
    await asyncio.sleep(0.01)
    assert "destroyed but it is pending" not in caplog.text


async def test_a_call_that_waits_for_a_permit_can_be_cancelled(site):
    open_trees = [await hung_call(site, id=f"{i}") for i in range(2)]
    waiting = asyncio.create_task(site.client.sample_tree(prompt(id="waiting")))
    await until(lambda: site.sampling.interactive == 3)
    waiting.cancel()
    await until(lambda: site.sampling.interactive == 2)
    assert not [rid for rid in site.engine.requests if rid.startswith("waiting")]
    for call in open_trees:
        call.cancel()
    site.engine.go_on.set()
    await site.still_serves()


async def test_the_calls_deadline_ends_the_tree(site):
    site.engine.go_on.clear()
    began = time.monotonic()
    with pytest.raises(RpcFailed) as caught:
        await site.client.sample_tree(prompt(), timeout_s=0.2)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - began < 5
    await until(lambda: not site.engine.running)
    site.engine.go_on.set()
    await site.still_serves()


async def test_the_trees_own_deadline_returns_what_there_is(site):
    written = site.engine.write

    def write(ids, number):
        if number == 3:
            site.engine.go_on.clear()
        return written(ids, number)

    site.engine.write = write
    tree = await site.client.sample_tree(prompt(deadline_s=0.3))
    assert tree.stop_cause is StopCause.DEADLINE
    assert tree.trajectories == 4
    check_tree(site, tree)
    site.engine.go_on.set()


async def test_the_trees_own_deadline_without_a_rollout(site):
    call = await hung_call(site, deadline_s=0.2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.reading
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "no rollout finished" in caught.value.details()
    site.engine.go_on.set()
    await site.still_serves()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineError("engine's words"), grpc.StatusCode.UNAVAILABLE),
        (ZeroDivisionError("odd words"), grpc.StatusCode.INTERNAL),
    ],
)
async def test_a_failing_engine_fails_the_call_alone(site, error, code):
    written = site.engine.write

    def fail(ids, number):
        raise error

    site.engine.write = fail
    request = sampling_pb2.SampleTreeRequest(prompt=prompt_to_proto(prompt()))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await site.raw_sampling.SampleTree(request).read()
    assert caught.value.code() is code
    assert str(error) in caught.value.details()
    site.engine.write = written
    await until(lambda: site.sampling.interactive == 0)
    await site.still_serves()


async def test_a_rollout_the_engine_gives_up_fails_the_call_alone(site):
    call = await hung_call(site)
    site.engine.abort(next(iter(site.engine.running)))
    with pytest.raises(grpc.aio.AioRpcError, match="gave up a rollout") as caught:
        await call.reading
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await until(lambda: not site.engine.running)
    site.engine.go_on.set()
    await site.still_serves()


async def test_many_trees_at_once(site):
    trees = await asyncio.gather(
        *(site.client.sample_tree(prompt(f"Question {i}?", f"{i}")) for i in range(20))
    )
    assert [tree.tree_id for tree in trees] == [f"{i}" for i in range(20)]
    for tree in trees:
        check_tree(site, tree)
    assert len(set(site.engine.requests)) == 20 * DEFAULTS.trajectories
    assert not any(math.isnan(tree.ledger.queue_s) for tree in trees)


async def test_a_long_prompt_is_computed_once(site):
    """Not by each of the first rollouts, which start together."""
    long = prompt("x" * 80)
    tree = await site.client.sample_tree(long)
    first, *others = site.engine.requests
    assert first.endswith("/prompt") and len(others) == DEFAULTS.trajectories
    assert not any(rid.endswith("/prompt") for rid in others)
    tree.validate()
    rollouts = sum(len(tree.prefix(end)) * tree.ends[end] for end in tree.end_nodes())
    assert tree.ledger.generated_tokens <= rollouts + 1
    site.engine.requests.clear()
    await site.client.sample_tree(prompt("x" * 10))
    assert len(site.engine.requests) == DEFAULTS.trajectories


async def test_one_first_rollout_computes_its_prompt_itself(site):
    tree = await site.client.sample_tree(prompt("x" * 80, init_rollouts=1, rounds=1))
    assert tree.trajectories == 1
    assert [rid.rsplit("/", 1)[1] for rid in site.engine.requests] == ["0"]


async def test_a_deadline_while_the_prompt_is_computed(site):
    site.engine.go_on.clear()
    with pytest.raises(RpcFailed, match="DEADLINE_EXCEEDED: no rollout finished"):
        await site.client.sample_tree(prompt("x" * 80, deadline_s=0.1))
    assert not site.engine.running
    assert [rid.rsplit("/", 1)[1] for rid in site.engine.requests] == ["prompt"]
    site.engine.go_on.set()
    await site.still_serves()
