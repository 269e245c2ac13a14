"""Damaged pushes at a real engine: what is served, its digest and its greedy output stay."""

from __future__ import annotations

import random

import pytest

from ibtree import Client
from ibtree.client import RpcFailed
from ibtree.weights.tensor_files import read_header
from tests.engine import Server, model_weights
from tests.loop.test_engine import prompt
from tests.loop.test_weights_in_flight import by_manifest

ATTEMPTS, GREEDY_EVERY = 200, 20


def damaged(whole: bytes, data_at: int, rng: random.Random, attempt: int) -> bytes:
    """A bit flipped or the end cut off, at a random place."""
    if attempt % 2:
        return whole[: rng.randrange(len(whole))]
    data = bytearray(whole)
    data[rng.randrange(data_at, len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def greedy(client: Client) -> list[tuple[int, ...]]:
    greedily = {"top_k": 1, "init_rollouts": 1, "rounds": 1}
    trees = [client.sample_tree(prompt(i, **greedily)) for i in range(2)]
    return [tree.prefix(tree.end_nodes()[0]) for tree in trees]


def test_200_damaged_pushes_change_nothing(server: Server) -> None:
    server.push_original()
    rng = random.Random(0)
    with Client(server.address) as client:
        before, said = client.get_weights(), greedy(client)
        new = model_weights(noise=0.3, seed=4)
        manifest, path = by_manifest(server, new, before.version + 1)
        whole, (data_at, _) = path.read_bytes(), read_header(path)
        for attempt in range(ATTEMPTS):
            path.write_bytes(damaged(whole, data_at, rng, attempt))
            with pytest.raises(RpcFailed, match=r"weights|chunk") as caught:
                client.push_weights(manifest, path)
            assert caught.value.code.name == "INVALID_ARGUMENT"
            after = client.get_weights()
            assert (after.version, after.digest) == (before.version, before.digest)
            if attempt % GREEDY_EVERY == 0:
                assert greedy(client) == said
        path.write_bytes(whole)
        client.push_weights(manifest, path)
        assert greedy(client) != said, "the damaged weights would not have shown"
    server.push_original()
