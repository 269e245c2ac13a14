"""Graders of a package that is really installed, in the grading processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ibtree.errors import FieldError
from ibtree.messages import Submission
from server_ext.rewards.base import Graders
from server_ext.rewards.exact import ExactGrader
from server_ext.rewards.installed import InstalledGrader, installed_graders
from server_ext.rewards.pool import GradingPool

MODULE = """
import os, time

def overlap(prompt, completion, answer):
    said = completion.split()
    return sum(word in prompt.split() for word in said) / max(len(said), 1)

def strict(prompt, completion, answer):
    return completion == answer

strict.needs_answer = True

def wild(prompt, completion, answer):
    if completion == "hang":
        time.sleep(60)
    if completion == "die":
        os._exit(1)
    if completion == "exit":
        raise SystemExit(0)
    return {"nan": float("nan"), "two": 2, "none": None, "half": 0.5}[completion]
"""
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "their-rewards"
version = "1.0"
[project.entry-points."ibtpo.rewards"]
overlap = "their_rewards:overlap"
strict = "their_rewards:strict"
wild = "their_rewards:wild"
exact = "their_rewards:wild"
[tool.setuptools]
py-modules = ["their_rewards"]
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Iterator[dict[str, InstalledGrader]]:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    (source / "their_rewards.py").write_text(MODULE)
    (source / "pyproject.toml").write_text(PROJECT)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    own = ["--no-build-isolation", "--target", str(target), str(source)]
    subprocess.run([*pip, *own], check=True, cwd=source, env={**os.environ, "PYTHONPATH": ""})
    pool = GradingPool(1, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(target)
        yield installed_graders(pool)
    pool.close()


async def test_partial_credit(theirs):
    grader = theirs["overlap"]
    grader.check("")
    assert await grader.grade(Submission("a b c", "a b x y", "")) == 0.5


async def test_one_that_needs_an_answer(theirs):
    with pytest.raises(FieldError, match="'strict' needs one") as caught:
        theirs["strict"].check(" ")
    assert caught.value.field == "answer"
    theirs["strict"].check("7")
    assert await theirs["strict"].grade(Submission("", "7", "7")) == 1.0
    assert await theirs["strict"].grade(Submission("", "8", "7")) == 0.0


@pytest.mark.parametrize("way", ["hang", "die", "exit", "nan", "two", "none", "raise"])
async def test_what_goes_wrong_costs_that_grade_alone(theirs, way, caplog):
    assert await theirs["wild"].grade(Submission("", way, "")) == 0.0
    assert "wild: " in caplog.text
    assert await theirs["wild"].grade(Submission("", "half", "")) == 0.5


def test_built_in_names_win_and_all_are_listed(theirs):
    exact = ExactGrader("####")
    graders = Graders(theirs | {"exact": exact})
    assert graders.named("exact") is exact
    with pytest.raises(FieldError, match=r"overlap \| strict \| wild"):
        graders.named("nope")
