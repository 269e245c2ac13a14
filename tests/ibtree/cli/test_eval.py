"""`ibtpo eval` on files of several kinds, and the commands that print a table, against a server."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal

import pytest

from ibtree.evaluation.accuracy import wilson
from tests.ibtree.cli.command import command, ended, ibtpo
from tests.server_ext.fakes import toy_text, until
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
    shown = json.loads(out)
    assert shown.pop("seconds") > 0
    assert shown == {
        "mean": sum(right) / 40,
        "low": low,
        "high": high,
        "problems": 40,
        "samples": 1,
        "pass_at_n": sum(right) / 40,
        "truncated": 0,
        "failed": 0,
        "first_failure": "",
        "temperature": pytest.approx(0.7),
        "max_new_tokens": 64,
    }


async def test_samples_stops_and_what_the_server_decides(site, tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "answer": "1"}) + "\n" for i in "abc"))
    site.engine.write = lambda ids, number: "x" * 100 if number else "#### 1"
    words = ["eval", "--server", site.target, "--prompts", str(path), "--samples=4", "--json"]
    code, out, err = await ibtpo(*words, "--stop=END", "--stop=a, b", "--seed=3", "--top-k=5")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert (shown["mean"], shown["pass_at_n"], shown["truncated"]) == (0.25, 1.0, 9)
    assert (shown["samples"], shown["max_new_tokens"]) == (4, 64)
    code, out, err = await ibtpo(*words[:-1])
    assert (code, err) == (0, "")
    assert re.search(r"pass_at_n +│ 1", out) and re.search(r"truncated +│ 9", out)


async def test_chats(site, tmp_path):
    """The fake tokenizer's template is [role]content."""
    path = tmp_path / "tasks.jsonl"
    own = [{"role": "user", "content": "b?"}]
    rows = [{"prompt": "a?", "answer": "1"}, {"prompt": own, "answer": "1"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen: list[str] = []
    site.engine.write = lambda ids, number: seen.append(bytes(ids).decode()) or "#### 1"
    words = ["eval", "--server", site.target, "--prompts", str(path), "--json"]
    for more, expected in [
        ([], ["[user]b?", "a?"]),
        (["--chat", "--prompt-template=Q: {prompt}"], ["[user]Q: a?", "[user]Q: b?"]),
        (["--system-prompt=Sum."], ["[system]Sum.[user]a?", "[system]Sum.[user]b?"]),
        (["--chat-template-args", '{"think": false}'], ["[user]a?", "[user]b?"]),
    ]:
        code, out, err = await ibtpo(*words, *more)
        assert (code, err, json.loads(out)["mean"]) == (0, "", 1.0)
        assert sorted(seen) == sorted(expected)
        seen.clear()


async def test_repeats_bad_rows_and_resuming(site, tmp_path):
    path, finished = tmp_path / "tasks.jsonl", tmp_path / "finished.jsonl"
    good = [json.dumps({"prompt": f"{i % 3}?", "answer": "1"}) for i in range(30)]
    path.write_text("\n".join([*good, "{\x1b", "3"]))
    words = ["eval", "--server", site.target, "--prompts", str(path), "--json"]
    code, out, err = await ibtpo(*words)
    assert (code, out) == (1, "") and err.startswith(f"ibtpo: prompts {path}:31: ")
    words += ["--skip-bad-rows", "--resume", str(finished)]
    code, out, err = await ibtpo(*words)
    assert (code, json.loads(out)["problems"]) == (0, 30)
    skipped, repeats = err.splitlines()
    assert skipped.startswith(f"ibtpo: prompts {path}: 2 of 32 rows skipped: prompts {path}:31: ")
    assert "27 of 30 rows repeat a prompt; --drop-repeats keeps the first of each" in repeats
    whole, requests = json.loads(out), len(site.engine.requests)
    code, out, err = await ibtpo(*words)
    assert f"30 of 30 problems were finished before, in {finished}" in err
    assert len(site.engine.requests) == requests
    again = json.loads(out)
    del again["seconds"], whole["seconds"]
    assert again == whole
    code, out, err = await ibtpo(*words, "--drop-repeats")
    assert json.loads(out)["problems"] == 3 and "27 of 30 rows repeat a prompt and are" in err


async def test_an_evaluation_that_is_interrupted_goes_on(site, tmp_path):
    path, finished = tmp_path / "tasks.jsonl", tmp_path / "finished.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "answer": "1"}) + "\n" for i in "abcd"))
    go_on, generate = asyncio.Event(), site.engine.generate

    async def hanging(rid, token_ids, *request, **more):
        if bytes(token_ids) in (b"c?", b"d?"):
            await go_on.wait()
        return await generate(rid, token_ids, *request, **more)

    site.engine.generate = hanging
    words = ["eval", "--server", site.target, "--prompts", str(path), "--json"]
    words += ["--resume", str(finished)]
    async with command(*words) as process:
        await until(lambda: finished.is_file() and len(finished.read_text().splitlines()) == 2, 30)
        process.send_signal(signal.SIGINT)
        assert (await ended(process))[:2] == (130, "")
    go_on.set()
    code, out, err = await ibtpo(*words)
    assert (code, json.loads(out)["problems"]) == (0, 4)
    assert "2 of 4 problems were finished before" in err


async def test_a_bar_on_a_terminal(site, tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"prompt": "a?", "answer": "1"}))
    ours, theirs = os.openpty()
    words = ["eval", "--server", site.target, "--prompts", str(path), "--json"]
    async with command(*words, stderr=theirs) as process:
        out, _ = await asyncio.wait_for(process.communicate(), 60)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    os.close(theirs)
    assert "problems" in shown and "1/1" in shown
    assert json.loads(out)["problems"] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--samples=0"], "ibtpo: samples: got 0; allowed: "),
        (["--samples=41"], "at most 40 (the server's --limit-trajectories)"),
        (["--temperature=0"], "sampling.temperature: got 0"),
        (["--chat-template-args={"], "ibtpo: chat_template_args: got '{'; allowed: JSON"),
        (["--chat-template-args=[1]"], "ibtpo: chat_template_args: got '[1]'; allowed: JSON"),
        (['--chat-template-args={"a": null}'], "prompt.chat.template_args: 'a' is None; allowed: "),
        (["--prompt-template=x"], "ibtpo: prompt_template: got 'x'; allowed: "),
        (["--stop=" + "x" * 300], "sampling.stop: characters: got 300"),
        (["--server=127.0.0.1:1"], "UNAVAILABLE: no server answers there; start ibtpo-server"),
        (["--resume=/dev/null/x"], "ibtpo: [Errno "),
    ],
)
async def test_bad_input_is_one_line(site, tmp_path, words, said):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"prompt": "a?", "answer": "1"}))
    code, out, err = await ibtpo("eval", "--server", site.target, f"--prompts={path}", *words)
    assert (code, out) == (1, "")
    assert said in err and err.count("\n") == 1


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
        "held",
    ]
    for name, key in [
        ("weights", "version"),
        ("cache", "open_trees"),
        ("audit-cache", "samples"),
    ]:
        code, out, err = await ibtpo(name, "--server", site.target, "--json")
        assert (code, err) == (0, "")
        assert json.loads(out)[key] == 0
