"""Agreement with the tree's majority: votes, ties, and rewards that follow while a tree grows."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from ibtree.messages import Submission
from ibtree.tree.score import values
from server_ext.rewards.base import TreeGrader
from server_ext.rewards.self_consistency import SelfConsistencyGrader
from tests.server_ext.site import Site, prompt

GRADER = SelfConsistencyGrader("####")


@pytest.fixture
async def site(tmp_path):
    async with Site(tmp_path, graders={"self_consistency": GRADER}) as site:
        yield site


@pytest.mark.parametrize(
    ("completion", "vote"),
    [
        ("#### 1,000", "1000"),
        (r"so \boxed{1000.0} of 7", "1000"),
        ("so 1000 it is.", "1000"),
        (r"\boxed{1} #### 2 (or 3)", "2 (or 3)"),
        ("#### \n5", "5"),
        ("####\n", ""),
        ("no idea", ""),
        ("", ""),
    ],
)
def test_what_a_trajectory_says(completion, vote):
    assert GRADER.vote(Submission("Q", completion, "not looked at")) == vote


@pytest.mark.parametrize(
    ("votes", "rewards"),
    [
        ([], []),
        ([("7", 1)], [1.0]),
        ([("", 1)], [0.0]),
        ([("7", 1), ("7", 1), ("8", 1)], [1.0, 1.0, 0.0]),
        ([("7", 1), ("8", 3), ("7", 1)], [0.0, 1.0, 0.0]),  # a vote is a rollout's
        ([("7", 1), ("8", 1)], [1.0, 1.0]),  # a tie: both
        ([("8", 2), ("7", 1), ("7", 1), ("9", 1)], [1.0, 1.0, 1.0, 0.0]),
        ([("", 5), ("7", 1), ("", 1)], [0.0, 1.0, 0.0]),  # no answer is no majority
    ],
)
def test_the_majority(votes, rewards):
    assert GRADER.rewards(votes) == rewards


def test_it_is_a_tree_grader_and_needs_no_answer():
    assert isinstance(GRADER, TreeGrader)
    GRADER.check("")


def said(site: Site, tree, node: int) -> str:
    text = site.tokenizer.decode(tree.prefix(node), special=False)
    return GRADER.vote(Submission("", text, ""))


def majorities(votes: Counter[str]) -> set[str]:
    answered = {answer: count for answer, count in votes.items() if answer}
    return {answer for answer, count in answered.items() if count == max(answered.values())}


@pytest.mark.parametrize("schedule", ["rounds", "eager"])
@pytest.mark.parametrize("strategy", ["ib", "entropy", "independent"])
async def test_all_rewards_follow_the_votes(site, strategy, schedule):
    options = {"strategy": strategy, "schedule": schedule, "init_rollouts": 5, "rounds": 11}
    changed = 0
    for seed in range(4):
        question = prompt(f"What {seed}?", grader="self_consistency", **options)
        *expansions, tree = [e async for e in site.client.sample_events(question)]
        tree.validate()
        ends = tree.end_nodes()
        votes: Counter[str] = Counter()
        for node in ends:
            votes[said(site, tree, node)] += tree.ends[node]
        for node in ends:
            assert tree.reward(node) == (said(site, tree, node) in majorities(votes))
        assert values(tree, "mean")[0] == sum(votes[m] for m in majorities(votes)) / 15
        if strategy == "entropy":
            continue  # splits: the expansions name nodes that are others by now
        so_far: Counter[str] = Counter()
        for e in expansions:
            so_far[said(site, tree, e.end_node)] += 1
            assert e.reward == (said(site, tree, e.end_node) in majorities(so_far))
            changed += e.reward != tree.reward(e.end_node)
        first = [tree.reward(e.end_node) for e in expansions if e.round == 1]
        assert tree.first_round_reward == sum(first) / len(first)
    assert changed or strategy == "entropy", "no reward was ever changed"


async def test_trajectories_that_a_split_merges_keep_all_their_votes(site):
    """The same tokens, drawn as a whole step by rollouts that were in flight while others had the
    step split."""
    texts = [f"{a}{b}\n\n#### {a + b}" for a in range(1, 4) for b in range(2)]

    def write(token_ids, number):
        before = site.tokenizer.decode(token_ids).removeprefix("What?")
        fitting = [text for text in texts if text.startswith(before)]
        return random.Random(number).choice(fitting)[len(before) :]

    generate = site.engine.generate

    async def at_different_times(rid, *request):
        for _ in range(random.Random(rid.rpartition("/")[2]).randrange(60)):
            await asyncio.sleep(0)
        return await generate(rid, *request)

    site.engine.write, site.engine.generate = write, at_different_times
    options = {"strategy": "entropy", "schedule": "eager", "init_rollouts": 12, "rounds": 25}
    tree = await site.client.sample_tree(prompt(grader="self_consistency", **options))
    tree.validate()
    votes: Counter[str] = Counter()
    for node in tree.end_nodes():
        votes[said(site, tree, node)] += tree.ends[node]
    assert votes.total() == 36 and len(majorities(votes)) < len(votes)
    for node in tree.end_nodes():
        assert tree.reward(node) == (said(site, tree, node) in majorities(votes))
    assert 0.0 <= tree.first_round_reward <= 1.0  # its ends may be merged too
