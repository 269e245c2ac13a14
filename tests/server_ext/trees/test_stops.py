"""Stop strings, against a search in the whole text token by token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibtree.tree import Finish
from server_ext.trees.cuts import stop_length
from tests.server_ext.site import Site, prompt
from tests.server_ext.trees.test_cuts import IDS, decode

STOPS = st.lists(
    st.sampled_from(["a", "ab", "b.", "\n\n", "é", "。", "a\n\nb", "<eos>"]), max_size=3
)


@given(IDS, IDS, STOPS)
def test_as_a_search_token_by_token(before, token_ids, stops):
    def has_stop(length: int) -> bool:
        return any(stop in decode(before + token_ids[:length]) for stop in stops)

    if has_stop(0):
        return  # such a path has ended before
    lengths = (n for n in range(1, len(token_ids) + 1) if has_stop(n))
    assert stop_length(decode, before, token_ids, stops) == next(lengths, None)


@pytest.mark.parametrize("strategy", ["ib", "independent", "entropy"])
async def test_a_stop_string_ends_every_trajectory_of_a_tree(tmp_path, strategy):
    """It does so also where it lies across a branch's start, which `entropy` splits anywhere."""
    asked = prompt(strategy=strategy, rounds=30, stop=("END",))
    borders = 0

    def go_on(token_ids, number: int) -> str:
        nonlocal borders
        done = len(token_ids) - len(asked.content)
        whole = f"{number % 3}\n\nxEND. #"
        borders += whole[:done].endswith(("E", "EN"))
        return whole[done:]

    async with Site(tmp_path) as site:
        site.engine.write = go_on
        tree = await site.client.sample_tree(asked, timeout_s=20)
    for end in tree.end_nodes():
        text = site.tokenizer.decode(tree.prefix(end))
        assert text.endswith("\n\nxEND")
        assert tree.finishes[end] is Finish.STOP
    assert (borders > 0) == (strategy == "entropy")
    kept_tokens = sum(len(tree.prefix(end)) * tree.ends[end] for end in tree.end_nodes())
    if strategy == "independent":
        dropped_tokens = len(". #") + 1  # and the end of sequence
        assert tree.ledger.generated_tokens == kept_tokens + dropped_tokens * tree.trajectories
