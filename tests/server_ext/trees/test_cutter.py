"""Step rules: the unit that a tree's first rollouts call for, and its record."""

from __future__ import annotations

import asyncio

import pytest

from ibtree.tree import Tree, TreeOptions
from server_ext.trees.cutter import StepCutter
from server_ext.trees.off_loop import OffLoop
from tests.server_ext.fakes import ToyTokenizer
from tests.server_ext.site import Site, prompt

PARAGRAPHS = "One.\n\nTwo.\nThree."
LINES = "One. Two.\nThree."
SENTENCES = "It is 3.5. Really? Yes."
BARE = "nothing to cut"


def cutter_for(options: TreeOptions) -> StepCutter:
    return StepCutter(ToyTokenizer(), options, OffLoop("rollouts"))


async def cut(texts: list[str], later: str = LINES, **options) -> tuple[Tree, list[list[int]]]:
    """Steps of the first rollouts, which come one after the other, and of a later one."""
    shape = TreeOptions(init_rollouts=len(texts), rounds=3, **options)
    tree, cutter = Tree(prompt=(1,), options=shape), cutter_for(shape)
    tokens = [tuple(text.encode()) for text in (*texts, later)]
    tasks = [
        asyncio.create_task(cutter.lengths(tree, number, token_ids))
        for number, token_ids in enumerate(tokens)
    ]
    return tree, list(await asyncio.gather(*tasks))


@pytest.mark.parametrize(
    ("texts", "unit", "steps"),
    [
        ([PARAGRAPHS, PARAGRAPHS, LINES], "paragraph", [2, 2, 1]),
        ([LINES, PARAGRAPHS, LINES], "line", [2, 4, 2]),
        ([LINES, SENTENCES, SENTENCES], "sentence", [3, 3, 3]),
        ([BARE, BARE, BARE], "sentence", [1, 1, 1]),
    ],
)
async def test_the_unit_is_chosen_from_the_first_rollouts(texts, unit, steps):
    tree, lengths = await cut(texts, step_rule="auto")
    assert tree.step_unit == unit
    assert [len(each) for each in lengths[:-1]] == steps


async def test_siblings_are_cut_alike():
    """An early rollout waits until all of the first round are there."""
    shape = TreeOptions(init_rollouts=2, rounds=2, step_rule="auto")
    tree, cutter = Tree(prompt=(1,), options=shape), cutter_for(shape)
    early = asyncio.create_task(cutter.lengths(tree, 0, tuple(PARAGRAPHS.encode())))
    await asyncio.sleep(0.01)
    assert not early.done() and not tree.step_unit
    assert len(await cutter.lengths(tree, 1, tuple(LINES.encode()))) == 1
    assert len(await early) == 2 and tree.step_unit == "paragraph"


async def test_a_deadline_ends_the_wait():
    shape = TreeOptions(init_rollouts=2, rounds=2, step_rule="auto")
    tree, cutter = Tree(prompt=(1,), options=shape), cutter_for(shape)
    early = asyncio.create_task(cutter.lengths(tree, 0, tuple(LINES.encode())))
    await asyncio.sleep(0)
    cutter.wait_no_longer()
    assert len(await early) == 2 and tree.step_unit == "line"


async def test_texts_and_a_greatest_length():
    tree, lengths = await cut(["a|b;c"], later="", separators=("|", ";"))
    assert lengths[0] == [2, 2, 1] and tree.step_unit == "text"
    _, lengths = await cut(["abcde|fg"], later="", separators=("|",), max_step_tokens=3)
    assert lengths[0] == [3, 3, 2]


async def test_a_tree_says_what_closed_its_steps(tmp_path):
    async with Site(tmp_path) as site:
        tree = await site.client.sample_tree(prompt(step_rule="auto"))
        assert tree.step_unit == "paragraph" and tree.options.step_rule == "auto"
        assert (await site.client.sample_tree(prompt())).step_unit == "text"
