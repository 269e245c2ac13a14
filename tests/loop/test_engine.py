"""Trees from the real engine: exact ids, exact log-probabilities, cache reuse, cancellation."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
import task
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from processes import MODEL

from ibtree import AsyncClient, Client, Prompt
from ibtree.client import RpcFailed
from ibtree.messages import Expansion
from ibtree.tree import Finish, StopCause, Tree
from ibtree.tree.options import TreeOptions, changed
from ibtree.wire.v1 import sampling_pb2, sampling_pb2_grpc
from learner.train.model import load_policy
from tests.engine import Server, model_weights

OPTIONS = changed(TreeOptions(), temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=96)
PROBLEMS, HELD_OUT = task.split(64, 64, 6, seed=1)


def prompt(i: int, **options: object) -> Prompt:
    return Prompt(
        PROBLEMS[i].prompt, answer=PROBLEMS[i].answer, options=changed(OPTIONS, **options)
    )


def trainer_logprobs(tree: Tree, model: torch.nn.Module, temperature: float) -> list[float]:
    """One log-probability a tree token, each trajectory run by itself, in float32."""
    found: dict[tuple[int, int], float] = {}
    for end in tree.end_nodes():
        ids = [*tree.prompt, *tree.prefix(end)]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].float() / temperature
        logp = torch.log_softmax(logits, -1)
        at = len(tree.prompt)
        for node in tree.path(end):
            for i, token in enumerate(tree.steps[node].token_ids):
                found[node, i] = float(logp[at - 1, token])
                at += 1
    return [found[key] for key in sorted(found)]


def engine_logprobs(tree: Tree) -> list[float]:
    return [lp for step in tree.steps for lp in step.logprobs]


def test_a_tree_of_the_paper_shape(server: Server) -> None:
    with Client(server.address) as client:
        events = list(client.sample_events(prompt(0)))
    *expansions, tree = events
    assert isinstance(tree, Tree)
    tree.validate()
    assert [e.trajectories for e in expansions if isinstance(e, Expansion)] == [*range(1, 13)]
    assert tree.trajectories == 12 and tree.stop_cause is StopCause.COMPLETE
    assert tree.ledger.generated_tokens >= tree.unique_tokens > 0
    assert 0 < tree.ledger.cached_tokens < tree.ledger.prefix_tokens
    assert set(tree.rewards()) <= {0.0, 1.0}
    assert all(tree.finishes[n] in (Finish.STOP, Finish.LENGTH) for n in tree.end_nodes())
    for node in range(1, len(tree)):  # an inner step ends with the separator
        if not tree.is_leaf(node):
            text = _text(tree.steps[node].token_ids)
            assert text.endswith("\n\n") and "\n\n" not in text[:-1], (node, text)


def _text(token_ids: tuple[int, ...]) -> str:
    from tokenizers import Tokenizer

    return str(Tokenizer.from_file(str(MODEL / "tokenizer.json")).decode(token_ids))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_engine_and_trainer_agree_on_log_probabilities(server: Server, temperature: float) -> None:
    server.push_original()
    model = load_policy(MODEL, torch.device("cpu"), "float32")
    with Client(server.address) as client:
        tree = client.sample_tree(prompt(1, temperature=temperature))
    gap = torch.tensor(engine_logprobs(tree)) - torch.tensor(
        trainer_logprobs(tree, model, temperature)
    )
    assert gap.abs().mean() < 1e-4 and gap.abs().max() < 1e-2


def test_independent_draws_all_from_the_prompt(server: Server) -> None:
    with Client(server.address) as client:
        tree = client.sample_tree(prompt(2, strategy="independent", init_rollouts=8, rounds=1))
    assert tree.starts[0] == tree.trajectories == 8 and sum(tree.starts) == 8


def test_the_math_grader(server: Server) -> None:
    right: dict[str, list[float]] = {"math": [], "exact": []}
    with Client(server.address) as client:
        for number in range(3, 9):  # of one problem's trajectories, none may be right
            asked = prompt(number)
            decimal = f"{asked.answer}.0"
            for grader, rewards in right.items():
                tree = client.sample_tree(
                    Prompt(asked.content, answer=decimal, grader=grader, options=OPTIONS)
                )
                for end in tree.end_nodes():
                    if _text(tree.steps[end].token_ids) == f"#### {asked.answer}":
                        rewards.append(tree.reward(end))
                    else:
                        assert tree.reward(end) == 0.0
    assert set(right["math"]) == {1.0}
    assert set(right["exact"]) == {0.0}  # to the letter, "5" is not "5.0"


@pytest.mark.parametrize("strategy", ["ib", "entropy"])
def test_stops_end_trajectories(server: Server, strategy: str) -> None:
    """A stop string to the token that completes it, wherever a branch began; a stop id at once."""
    from tokenizers import Tokenizer

    (newline,) = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode("\n\n").ids[:1]
    with Client(server.address) as client:
        by_text = client.sample_tree(prompt(9, strategy=strategy, stop=("\n\n####", "####")))
        by_id = client.sample_tree(prompt(9, strategy=strategy, stop_token_ids=(newline,)))
    for tree in (by_text, by_id):
        tree.validate()
        assert all(tree.finishes[n] is not Finish.NONE for n in tree.end_nodes())
        assert Finish.STOP in {tree.finishes[n] for n in tree.end_nodes()}
    for end in by_text.end_nodes():
        text = _text(by_text.prefix(end))
        if by_text.finishes[end] is Finish.STOP and "####" in text:
            assert text.endswith("####") and text.count("####") == 1, text
    assert any(_text(by_text.prefix(n)).endswith("####") for n in by_text.end_nodes())
    for end in by_id.end_nodes():
        assert newline not in by_id.prefix(end)[:-1]


def test_text_for_clients_without_a_tokenizer(server: Server) -> None:
    with Client(server.address) as client:
        *expansions, tree = client.sample_events(prompt(10), include_text=True)
    assert isinstance(tree, Tree)
    assert tree.texts == [_text(step.token_ids) for step in tree.steps]
    for event in expansions:
        assert isinstance(event, Expansion)
        whole = _text(tree.prefix(event.end_node))
        assert event.text and whole.endswith(event.text)


def test_token_ids_and_text_grow_the_same_prompt(server: Server) -> None:
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(PROBLEMS[4].prompt).ids
    with Client(server.address) as client:
        a = client.sample_tree(prompt(4))
        b = client.sample_tree(Prompt(ids, answer=PROBLEMS[4].answer, options=OPTIONS))
    assert a.prompt == b.prompt == tuple(ids)


async def test_cancelling_a_call_aborts_its_rollouts(server: Server) -> None:
    async with AsyncClient(server.address) as client:
        slow = prompt(5, init_rollouts=128, rounds=1, max_new_tokens=96)
        calls = [asyncio.create_task(client.sample_tree(slow)) for _ in range(4)]
        await until(lambda: interactive(client), 4)
        for call in calls:
            call.cancel()
        began = time.monotonic()
        await until(lambda: interactive(client), 0)
        assert time.monotonic() - began < 5.0
        # a weight update waits for rollouts and needs an idle engine to empty its cache: were the
        # 512 rollouts still running it would take as long as they do
        outcome = await asyncio.to_thread(server.push, model_weights())
        assert outcome.pause_s < 3.0
        tree = await client.sample_tree(prompt(6))  # and the engine goes on
        assert tree.trajectories == 12


async def interactive(client: AsyncClient) -> int:
    return (await client.queue_stats()).interactive


async def until(probe, expected: int, timeout_s: float = 20.0) -> None:  # type: ignore[no-untyped-def]
    async with asyncio.timeout(timeout_s):
        while await probe() != expected:
            await asyncio.sleep(0.02)


def test_a_deadline_ends_the_tree_with_what_it_has(server: Server) -> None:
    with Client(server.address) as client:
        tree = client.sample_tree(prompt(7, rounds=200, deadline_s=1.0))
    assert tree.stop_cause is StopCause.DEADLINE and 0 < tree.trajectories < 203
    tree.validate()


def test_health_on_both_ports(server: Server) -> None:
    for address in (server.address, server.health):
        with grpc.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service="ibtree.v1.TreeSamplingService")
            assert stub.Check(request, timeout=5).status == health_pb2.HealthCheckResponse.SERVING


def _raw(server: Server, message: sampling_pb2.Prompt) -> RpcFailed | grpc.RpcError:
    with grpc.insecure_channel(server.address) as channel:
        stub = sampling_pb2_grpc.TreeSamplingServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.SampleTree(sampling_pb2.SampleTreeRequest(prompt=message), timeout=30))
        return caught.value


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("prompt", {"text": ""}),
        ("prompt", {"text": "1+" * 400}),
        ("answer", {"answer": ""}),
        ("grader", {"grader": "oracle"}),
        ("init_rollouts", {"options": {"init_rollouts": -4}}),
        ("rounds", {"options": {"rounds": 1_000_000}}),
        ("options.rounds", {"options": {"rounds": 4000}}),
        ("sampling.temperature", {"options": {"sampling": {"temperature": float("nan")}}}),
        ("options.strategy", {"options": {"strategy": "guess"}}),
        ("options.schedule", {"options": {"schedule": "later"}}),
        ("value_estimator", {"options": {"value_estimator": "median"}}),
        ("sampling.max_new_tokens", {"options": {"sampling": {"max_new_tokens": 0}}}),
    ],
)
def test_bad_input_names_the_field_and_the_server_goes_on(
    server: Server, field: str, change: dict[str, object]
) -> None:
    good = {"text": PROBLEMS[8].prompt, "answer": PROBLEMS[8].answer}
    error = _raw(server, sampling_pb2.Prompt(**(good | change)))  # type: ignore[arg-type]
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith(f"{field}:") and "allowed:" in error.details()
    with Client(server.address) as client:
        single = changed(OPTIONS, init_rollouts=1, rounds=1)
        assert client.sample_tree(Prompt(**_kw(good), options=single)).trajectories == 1


def _kw(good: dict[str, str]) -> dict[str, str]:
    return {"content": good["text"], "answer": good["answer"]}


@pytest.mark.parametrize("schedule", ["rounds", "eager"])
@pytest.mark.parametrize("strategy", ["ib_budget", "random", "fixed_width", "entropy"])
def test_every_strategy_grows_exact_trees(server: Server, strategy: str, schedule: str) -> None:
    """Also where steps are split at tokens: each token's log-probability is the trainer's."""
    server.push_original()
    with Client(server.address) as client:
        tree = client.sample_tree(prompt(5, strategy=strategy, schedule=schedule))
    tree.validate()
    assert tree.trajectories == 12 and tree.stop_cause is StopCause.COMPLETE
    assert tree.ledger.refilled_tokens == 0
    model = load_policy(MODEL, torch.device("cpu"), "float32").eval()
    pairs = zip(engine_logprobs(tree), trainer_logprobs(tree, model, 1.0), strict=True)
    assert max(abs(a - b) for a, b in pairs) < 1e-3
