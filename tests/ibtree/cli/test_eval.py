"""`ibtpo eval` on files of several kinds, and the commands that print a table, against a server."""

from __future__ import annotations

import json

import pytest

from ibtree.evaluation.accuracy import wilson
from tests.ibtree.cli.command import ibtpo
from tests.server_ext.fakes import toy_text
from tests.server_ext.site import Site


@pytest.fixture
async def site(tmp_path):
    async with Site(tmp_path) as site:
        yield site


@pytest.mark.parametrize("names", [("question", "answer"), ("task", "gold")])
async def test_accuracy_on_prompts_by_field_and_template(site, tmp_path, names):
    tasks = [f"{i}?" for i in range(40)]
    sent = [site.tokenizer.encode(f"Q: {task}\n") for task in tasks]
    right = [toy_text(ids, 0).endswith("#### 1") for ids in sent]
    assert 5 < sum(right) < 35
    rows = [{names[0]: task, names[1]: "1 it is.\n#### 1"} for task in tasks]
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", "--server", site.target, "--prompts", str(path), "--max-new-tokens=64"]
    words += ["--prompt-template=Q: {prompt}\n"]
    if names[0] == "task":
        code, out, err = await ibtpo(*words)
        assert (code, out) == (1, "")
        assert err.startswith(f"ibtpo: prompts {path}:1: no field 'prompt' in ['task', 'gold']; ")
        words += ["--prompt-field=task", "--answer-field=gold"]
    code, out, err = await ibtpo(*words, "--json")
    assert (code, err) == (0, "")
    low, high = wilson(sum(right) / 40, 40)
    assert json.loads(out) == {"mean": sum(right) / 40, "low": low, "high": high, "problems": 40}


async def test_figures_as_a_table_and_as_json(site):
    code, out, err = await ibtpo("queue", "--server", site.target)
    assert (code, err) == (0, "")
    assert [line.split()[1] for line in out.splitlines()[1:-1]] == [
        "queued",
        "growing",
        "graded",
        "leased",
        "acked",
        "dead",
        "interactive",
    ]
    for command, key in [
        ("weights", "version"),
        ("cache", "open_trees"),
        ("audit-cache", "samples"),
    ]:
        code, out, err = await ibtpo(command, "--server", site.target, "--json")
        assert (code, err) == (0, "")
        assert json.loads(out)[key] == 0
