"""Graders of a package that is really installed, in the grading processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest

from ibtree.errors import FieldError
from ibtree.messages import Submission
from server_ext.app import _graders
from server_ext.config import ServerConfig
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


async def test_the_server_lists_all_graders_and_its_own_names_win(theirs, tmp_path):
    """`theirs` is installed while this runs, and brings an `exact` of its own."""
    async with AsyncExitStack() as stack:
        graders = _graders(ServerConfig(model=tmp_path), stack)
        assert type(graders.named("exact")) is ExactGrader
        with pytest.raises(FieldError) as caught:
            graders.named("nope")
        built_in = {"exact", "math", "regex", "self_consistency", "remote"}
        assert set(caught.value.allowed.split(" | ")) == built_in | {"overlap", "strict", "wild"}
        with pytest.raises(FieldError, match="reward_address"):
            graders.check("remote", "7")
        for name in built_in - {"remote", "self_consistency"}:
            with pytest.raises(FieldError, match=f"{name!r} needs one"):
                graders.check(name, "")
        graders.check("self_consistency", "")


async def test_a_server_whose_default_grader_cannot_grade_does_not_start(tmp_path):
    async with AsyncExitStack() as stack:
        with pytest.raises(FieldError, match="reward_address"):
            _graders(ServerConfig(model=tmp_path, grader="remote"), stack)
        config = ServerConfig(model=tmp_path, grader="remote", reward_address="localhost:1")
        _graders(config, stack).check("remote", "")
