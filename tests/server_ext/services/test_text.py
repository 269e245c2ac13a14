"""Text in the stream and in the tree, for callers without the model's tokenizer."""

from __future__ import annotations

import asyncio

import pytest

from ibtree import Client, Prompt
from tests.server_ext.site import DEFAULTS, Site, prompt


@pytest.fixture
async def site(tmp_path):
    async with Site(tmp_path) as site:
        yield site


@pytest.mark.parametrize("strategy", ["fixed_width", "entropy"])
async def test_texts_of_events_and_nodes_are_those_of_their_tokens(site, strategy):
    asked = prompt(strategy=strategy, rounds=9)
    *expansions, tree = [e async for e in site.client.sample_events(asked, include_text=True)]
    decode = site.tokenizer.decode
    assert tree.texts == [decode(step.token_ids, special=False) for step in tree.steps]
    assert any(e.start_node for e in expansions)

    ends = {decode(tree.prefix(n), special=False) for n in tree.end_nodes()}
    for e in expansions:
        assert len(e.text) == e.generated_tokens - 1, "all that it generated, without the end"
        assert any(end.endswith(e.text) for end in ends)
    assert {e.text for e in expansions if not e.start_node} <= ends


async def test_no_text_unless_asked_for(site):
    *expansions, tree = [e async for e in site.client.sample_events(prompt())]
    assert {e.text for e in expansions} == {""}
    assert tree.texts == []
    assert (await site.client.sample_tree(prompt())).texts == []
    assert len((await site.client.sample_tree(prompt(), include_text=True)).texts) > 1


async def test_the_synchronous_client_asks_for_it_too(site):
    def calls():
        with Client(site.target, timeout_s=20) as client:
            *expansions, tree = list(client.sample_events(prompt(), include_text=True))
            return expansions, tree, client.sample_tree(prompt(), include_text=True)

    expansions, tree, again = await asyncio.to_thread(calls)
    assert all(e.text for e in expansions)
    assert tree.texts == again.texts
    assert "".join(tree.texts[n] for n in tree.path(tree.end_nodes()[0])).count("####") == 1


async def test_a_character_cut_by_the_limit_is_marked(site):
    site.engine.write = lambda ids, number: "€€"
    asked = prompt(max_new_tokens=4)
    tree = await site.client.sample_tree(asked, include_text=True)
    assert tree.texts == ["", "€\ufffd"]


async def test_options_that_are_left_out_are_the_servers(site):
    asked = Prompt("What?", answer="1", options={"rounds": 2, "top_k": 3, "stop": ["."]})
    tree = await site.client.sample_tree(asked)
    assert tree.options.init_rollouts == DEFAULTS.init_rollouts == 3
    assert (tree.options.rounds, tree.trajectories) == (2, 4)
    assert (tree.options.sampling.top_k, tree.options.sampling.stop) == (3, (".",))
    assert tree.options.sampling.max_new_tokens == DEFAULTS.sampling.max_new_tokens == 64
