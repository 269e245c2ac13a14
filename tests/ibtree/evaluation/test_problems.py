"""Keys and seeds of problems, and the file of those that are finished."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ibtree.errors import FieldError
from ibtree.evaluation.accuracy import Outcome
from ibtree.evaluation.problems import FinishedProblems, outcomes_by_content, problems_of
from ibtree.messages import Chat, ChatMessage, Prompt
from ibtree.tree.options import MAX_SEED

PROMPTS = [Prompt(f"{n}?", answer="1") for n in range(3)]
PROMPTS.append(Prompt(Chat((ChatMessage("user", "0?"),), {"think": True})))
OPTIONS = {"temperature": 1.0, "stop": ("END",), "rounds": 9, "strategy": "ib", "seed": 7}
OUTCOME = Outcome((1.0, 0.0), 1, 1.0, 64, (2, 2))


def test_each_problem_is_a_tree_of_independent_rollouts():
    problem, *_ = problems_of(PROMPTS, OPTIONS, 8, None, "w")
    assert problem.prompt.options == {
        "temperature": 1.0,
        "stop": ("END",),
        "strategy": "independent",
        "schedule": "rounds",
        "init_rollouts": 8,
        "rounds": 1,
        "branch_nodes": 1,
        "branch_rollouts": 1,
    }
    with pytest.raises(FieldError, match="samples"):
        problems_of(PROMPTS, OPTIONS, 0, None, "w")


def test_keys_follow_from_what_is_asked_and_of_which_weights():
    def keys(prompts=PROMPTS, options=OPTIONS, samples=2, seed=1, weights="w") -> list[str]:
        return [p.key for p in problems_of(prompts, options, samples, seed, weights)]

    same = keys()
    assert len(set(same)) == 4 and keys() == same
    assert keys(options={**OPTIONS, "stop": ["END"], "rounds": 3}) == same
    assert keys(PROMPTS[1:]) == same[1:], "the others do not matter"
    for changes in [{"samples": 3}, {"seed": 2}, {"weights": "v"}, {"options": {}}]:
        assert not set(keys(**changes)) & set(same)
    again = keys([*PROMPTS, *PROMPTS])
    assert again[:4] == same and len(set(again)) == 8, "repeats are problems of their own"


def test_each_problem_has_a_seed_of_its_own():
    seeds = [p.prompt.options["seed"] for p in problems_of(PROMPTS * 50, {}, 2, 3, "w")]
    assert len(set(seeds)) == 200 and all(0 <= seed <= MAX_SEED - 4096 for seed in seeds)


def test_what_is_finished_is_known_after_a_kill(tmp_path):
    path = tmp_path / "deep" / "finished.jsonl"
    first, second, third, _ = problems_of(PROMPTS, OPTIONS, 2, 1, "w")
    with FinishedProblems(path) as finished:
        assert finished.of(first) is None
        finished.add(first, OUTCOME)
        assert path.read_bytes().endswith(b"\n"), "before the next one is finished"
        finished.add(second, OUTCOME)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + b"")  # cut off by the kill
    with FinishedProblems(path) as finished:
        assert finished.of(first) == OUTCOME and finished.of(second) is None
        finished.add(second, OUTCOME)
    with FinishedProblems(path) as finished:
        assert [finished.of(p) for p in (first, second, third)] == [OUTCOME, OUTCOME, None]


@pytest.mark.parametrize("line", ["3", "{}", '{"problem": 1, "versions": 2}', "\x00", "[1]"])
def test_other_lines_are_left_alone(tmp_path, line):
    path = tmp_path / "finished.jsonl"
    path.write_text(line + "\n" + json.dumps({"problem": "p", "rewards": ["x"]}) + "\n")
    before = path.read_text()
    problem = problems_of(PROMPTS, OPTIONS, 2, 1, "w")[0]
    with FinishedProblems(path) as finished:
        finished.add(problem, OUTCOME)
    with FinishedProblems(path) as finished:
        assert finished.of(problem) == OUTCOME
    assert path.read_text().startswith(before)


def test_two_evaluations_are_paired_by_what_they_asked(tmp_path):
    """Whatever the weights, the seed and the number of samples; repeats stay apart."""
    rewards = {}
    for name, samples, weights in (("before", 2, "w"), ("after", 3, "v")):
        path = tmp_path / f"{name}.jsonl"
        problems = problems_of([*PROMPTS, PROMPTS[0]], OPTIONS, samples, samples, weights)
        with FinishedProblems(path) as finished:
            for n, problem in sorted(enumerate(problems), reverse=name == "after"):
                finished.add(problem, replace(OUTCOME, rewards=(float(n),) * samples))
        with path.open("a") as file:
            file.write('{"content": "cut o')
        rewards[name] = {key: o.mean for key, o in outcomes_by_content(path).items()}
    assert rewards["before"] == rewards["after"]
    assert sorted(rewards["after"].values()) == [0, 1, 2, 3, 4]
