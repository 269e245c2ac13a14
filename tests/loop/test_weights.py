"""Pushed weights on the real engine: exact, atomic, and never with KV of the weights before."""

from __future__ import annotations

import asyncio

import grpc
import pytest
import torch
from processes import MODEL
from safetensors.torch import save_file

from ibtree import AsyncClient, Client, Tree
from ibtree.client import RpcFailed
from ibtree.messages import Expansion
from ibtree.weights.model_folder import model_identity
from ibtree.weights.tensor_files import make_manifest
from learner.train.model import load_policy
from tests.engine import Server, Weights, model_weights
from tests.loop.test_engine import prompt, trainer_logprobs

MODEL_ID = model_identity(MODEL)


def policy(weights: Weights) -> torch.nn.Module:
    model = load_policy(MODEL, torch.device("cpu"), "float32")
    model.load_state_dict(weights, strict=False)
    return model


def by_version(tree: Tree, values: list[float]) -> dict[int, torch.Tensor]:
    versions = [v for step in tree.steps for v in step.versions]
    return {
        version: torch.tensor([x for x, v in zip(values, versions, strict=True) if v == version])
        for version in set(versions)
    }


def stale_kv_logprobs(tree: Tree, node: int, old: torch.nn.Module, new: torch.nn.Module) -> float:
    """Greatest |difference| of a node's log-probabilities if its prefix's KV were the old ones."""
    path = tree.path(node)
    prefix = [*tree.prompt, *(t for n in path[:-1] for t in tree.steps[n].token_ids)]
    ids = torch.tensor([list(tree.steps[node].token_ids)])
    with torch.no_grad():
        cache = old(torch.tensor([prefix[:-1]]), use_cache=True).past_key_values
        tail = torch.cat([torch.tensor([[prefix[-1]]]), ids[:, :-1]], 1)
        stale = torch.log_softmax(new(tail, past_key_values=cache).logits[0].float(), -1)
        whole = torch.tensor([[*prefix, *ids[0].tolist()]])
        fresh = torch.log_softmax(new(whole).logits[0, len(prefix) - 1 : -1].float(), -1)
    pick = ids[0][:, None]
    return float((stale.gather(1, pick) - fresh.gather(1, pick)).abs().max())


async def test_old_kv_is_never_used_for_new_weights(server: Server) -> None:
    """Pushes other weights between two rounds of a tree while other trees are in flight; every
    token must have the log-probability that the weights of its own version give its whole path."""
    server.push_original()
    before, after = model_weights(), model_weights(noise=0.3, seed=3)
    async with AsyncClient(server.address) as client:
        others = [asyncio.create_task(client.sample_tree(prompt(i))) for i in range(8, 24)]
        events = client.sample_events(prompt(0))
        tree: Tree | None = None
        pushed: asyncio.Task[object] | None = None
        async for event in events:
            if isinstance(event, Expansion) and event.round == 3:
                pushed = asyncio.create_task(asyncio.to_thread(server.push, after))
            if isinstance(event, Tree):
                tree = event
        trees = [tree, *await asyncio.gather(*others)]
        assert pushed and tree
        await pushed
    old, new = policy(before), policy(after)
    spans = by_version(tree, [0.0] * tree.unique_tokens)
    assert len(spans) == 2, "the push fell between two rounds of the tree"
    first, second = sorted(spans)
    for one in trees:
        assert one
        engine = [lp for step in one.steps for lp in step.logprobs]
        for version, model in ((first, old), (second, new)):
            expected = by_version(one, trainer_logprobs(one, model, 1.0)).get(version)
            if expected is not None:
                got = by_version(one, engine)[version]
                assert (got - expected).abs().max() < 1e-3
    # and the check has teeth: with the old KV under the new weights it would have failed
    reused = [
        (grown, n)
        for grown in trees
        if grown
        for n in range(1, len(grown))
        if set(grown.steps[n].versions) == {second}
        and grown.parents[n]
        and set(grown.steps[grown.parents[n]].versions) == {first}
    ]
    assert reused
    assert max(stale_kv_logprobs(grown, n, old, new) for grown, n in reused) > 1e-2


def test_push_serves_exactly_what_was_sent(server: Server) -> None:
    weights = model_weights(noise=0.05, seed=1)
    outcome = server.push(weights)
    assert outcome.state == "serving" and outcome.pause_s > 0
    with Client(server.address) as client:
        served = client.get_weights()
        assert (served.version, served.digest) == (outcome.version, outcome.digest)
        tree = client.sample_tree(prompt(1))
    assert {v for step in tree.steps for v in step.versions} == {outcome.version}
    engine = torch.tensor([lp for step in tree.steps for lp in step.logprobs])
    expected = torch.tensor(trainer_logprobs(tree, policy(weights), 1.0))
    assert (engine - expected).abs().max() < 1e-3
    server.push_original()


@pytest.mark.parametrize(
    ("code", "says", "spoil"),
    [
        ("FAILED_PRECONDITION", "is not in the model", lambda w: w | {"extra": torch.zeros(2)}),
        ("FAILED_PRECONDITION", "is missing", lambda w: dict(list(w.items())[1:])),
        (
            "FAILED_PRECONDITION",
            "has shape",
            lambda w: w | {"model.norm.weight": torch.zeros(7)},
        ),
        (
            "FAILED_PRECONDITION",
            "has dtype BF16",
            lambda w: w | {"model.norm.weight": w["model.norm.weight"].bfloat16()},
        ),
    ],
)
def test_wrong_tensors_are_refused(server: Server, code: str, says: str, spoil) -> None:  # type: ignore[no-untyped-def]
    with Client(server.address) as client:
        before = client.get_weights()
        with pytest.raises(RpcFailed, match=says) as caught:
            server.push(spoil(model_weights()))
        assert caught.value.code.name == code
        after = client.get_weights()
        assert (after.version, after.digest) == (before.version, before.digest)
        assert after.state == "rejected"


def test_a_wrong_digest_an_old_version_and_another_model_are_refused(server: Server) -> None:
    path = server.folder / "spoiled.safetensors"
    save_file(model_weights(), path)
    with Client(server.address) as client:
        version = client.get_weights().version
        good = make_manifest(path, version + 1, MODEL_ID)
        data = bytearray(path.read_bytes())
        data[-5] ^= 4
        path.write_bytes(data)
        with pytest.raises(RpcFailed, match="wrong digest") as caught:
            client.push_weights(good, path)
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
        path.write_bytes(data[:-100])
        with pytest.raises(RpcFailed, match="ended after"):
            client.push_weights(good, path)
        save_file(model_weights(), path)
        with pytest.raises(RpcFailed, match="are of model") as caught:
            client.push_weights(make_manifest(path, version + 1, "0" * 64), path)
        assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
        with pytest.raises(RpcFailed, match="not newer"):
            client.push_weights(make_manifest(path, 0, MODEL_ID), path)
        assert client.get_weights().version == version
        assert client.sample_tree(prompt(2)).trajectories == 12


def test_the_served_version_again_is_a_no_op(server: Server) -> None:
    server.push(model_weights())
    path = server.folder / "push.safetensors"
    with Client(server.address) as client:
        served = client.get_weights()
        outcome = client.push_weights(make_manifest(path, served.version, MODEL_ID), path)
        assert outcome.state == "serving" and outcome.pause_s == 0
        save_file(model_weights(noise=0.1), path)
        with pytest.raises(RpcFailed, match="not newer"):
            client.push_weights(make_manifest(path, served.version, MODEL_ID), path)
