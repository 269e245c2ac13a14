"""`ibtpo sample` against a server: the tree in the terminal and as JSON, bad input, Ctrl-C."""

from __future__ import annotations

import asyncio
import io
import json
import math
import os
import re
import signal
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from ibtree import Prompt, Step, Tree
from ibtree.cli import main
from ibtree.text import printable
from ibtree.tree.options import changed
from ibtree.tree.score import confidences, ib_scores, values
from tests.ibtree.cli.command import command, ended, ibtpo
from tests.server_ext.fakes import until
from tests.server_ext.site import DEFAULTS, Site

ROW = re.compile(r"(\d+)× (\d\.\d\d) (\d\.\d\d) (?: *([+-]\d+\.\d\d)|      ) (.*?)\s*$", re.M)
NASTY = "\x1b[2J\x1b]0;mine\x07\r \u202e[bold]\x00\n\n#### 1"


@pytest.fixture
async def site(tmp_path):
    async with Site(tmp_path, max_calls=2) as site:
        yield site


def recomputed(tree: Tree) -> Counter[tuple[str, ...]]:
    """Figures and text of each step as they should be printed."""
    o = tree.options
    value, confidence = values(tree, o.value_estimator), confidences(tree, o.confidence)
    score, rows = ib_scores(tree), Counter()
    for n in range(1, len(tree)):
        text = tree.texts[n].replace("\n", "\\n")
        if tree.ends[n]:
            text += f" ⇒ {tree.reward(n):.2f}" + (f" ×{tree.ends[n]}" if tree.ends[n] > 1 else "")
        shown = "" if math.isnan(score[n]) else f"{score[n]:+.2f}"
        rows[str(tree.draws[n]), f"{value[n]:.2f}", f"{confidence[n]:.2f}", shown, text] += 1
    return rows


@pytest.mark.parametrize("estimator", ["mean", "backup"])
async def test_every_step_is_printed_with_its_figures(site, estimator):
    asked = Prompt("Say\nwhat?", "", "1", "", {"rounds": 12, "value_estimator": estimator})
    tree = await site.client.sample_tree(asked, include_text=True)
    assert tree.unique_tokens < tree.ledger.generated_tokens, "some steps are shared"
    words = ["--rounds=12", f"--value-estimator={estimator}", "--answer=1"]
    code, out, err = await ibtpo("sample", "--server", site.target, "--prompt=Say\nwhat?", *words)
    assert (code, err) == (0, "")
    printed = Counter(tuple(groups) for groups in ROW.findall(out))
    assert printed == recomputed(tree)
    head, root, *_, last = out.splitlines()
    assert head.rstrip() == "draws, value, confidence, IB-Score, step"
    assert root.split() == [
        f"{values(tree, estimator)[0]:.2f}",
        f"{ib_scores(tree)[0]:+.2f}",
        "Say\\nwhat?",
    ]
    cost = tree.ledger
    assert last.startswith(f"complete: 14 trajectories, mean reward {tree.rewards().mean():.2f} ")
    assert f" {cost.generated_tokens} tokens generated, {tree.unique_tokens} unique; " in last
    assert f" {cost.prefix_tokens} prefix tokens, {cost.cached_tokens} cached" in last


def rebuilt(shown: dict, options) -> Tree:
    """The tree from the tokens, counts and rewards in the JSON alone."""
    tree = Tree(prompt=tuple(shown["prompt_token_ids"]), options=options)
    for node in shown["nodes"][1:]:
        ids = tuple(node["token_ids"])
        tree.graft(node["parent"], Step(ids, tuple(node["logprobs"]), (0,) * len(ids)))
    for name in ("draws", "visits", "starts", "ends"):
        setattr(tree, name, [node[name] for node in shown["nodes"]])
    own = [node["ends"] * (node["reward"] or 0.0) for node in shown["nodes"]]
    for n in reversed(range(len(tree))):
        tree.reward_sums[n] += own[n]
        if n:
            tree.reward_sums[tree.parents[n]] += tree.reward_sums[n]
    return tree


async def test_json_is_the_whole_tree(site):
    words = ["--prompt=Go", "--answer=1", "--json", "--rounds=12", "--value-estimator=backup"]
    words += ["--confidence=sibling", "--strategy=fixed_width"]
    code, out, err = await ibtpo("sample", "--server", site.target, *words)
    assert (code, err) == (0, "")
    shown = json.loads(out)
    options = changed(
        DEFAULTS,
        rounds=12,
        value_estimator="backup",
        confidence="sibling",
        strategy="fixed_width",
    )
    assert shown["options"] == json.loads(json.dumps(asdict(options)))
    tree, nodes = rebuilt(shown, options), shown["nodes"]
    assert len(tree) == len(nodes) > 14
    for node, value, confidence, score in zip(
        nodes,
        values(tree, "backup"),
        confidences(tree, "sibling"),
        ib_scores(tree),
        strict=True,
    ):
        assert node["value"] == pytest.approx(value)
        assert node["confidence"] == pytest.approx(confidence)
        assert (node["ib_score"] is None) == math.isnan(score)
        assert node["ib_score"] is None or node["ib_score"] == pytest.approx(score)
        assert node["text"] == site.tokenizer.decode(node["token_ids"], special=False)
        assert node["finish"] == ("stop" if node["ends"] else None)
    assert any(node["starts"] for node in nodes[1:])
    assert shown["trajectories"] == tree.trajectories == 14
    assert shown["mean_reward"] == pytest.approx(tree.rewards().mean())
    assert shown["ledger"]["unique_tokens"] == tree.unique_tokens
    assert shown["ledger"]["generated_tokens"] > tree.unique_tokens
    assert set(shown["ledger"]) >= {"prefix_tokens", "cached_tokens", "wall_s", "queue_s"}
    assert (shown["stop_cause"], shown["answer"]) == ("complete", "1")


async def test_prompts_from_stdin_and_chats(site):
    async def asked(*words: str, stdin: bytes = b"") -> str:
        words = ("sample", "--server", site.target, "--answer=1", "--json", *words)
        code, out, err = await ibtpo(*words, stdin=stdin)
        assert (code, err) == (0, "")
        return bytes(json.loads(out)["prompt_token_ids"]).decode()

    assert await asked("--prompt=-", stdin="ü\n".encode()) == "ü\n"
    assert await asked("--prompt=ü", "--chat") == "[user]ü"
    assert await asked("--prompt=-", "--chat-system=Be brief.", stdin=b"Hm?") == (
        "[system]Be brief.[user]Hm?"
    )


async def test_text_of_the_model_cannot_steer_the_terminal(site):
    site.engine.write = lambda ids, number: NASTY
    words = ["sample", "--server", site.target, "--prompt=\x1b[31m", "--answer=1"]
    code, out, _ = await ibtpo(*words)
    assert code == 0
    assert {c for c in out if not c.isprintable()} == {"\n"}
    assert r"\x1b[2J\x1b]0;mine\x07\r \u202e[bold]\x00\n\n" in out
    assert r"\x1b[31m" in out
    *_, last = json.loads((await ibtpo(*words, "--json")).out)["nodes"]
    assert last["text"] == "#### 1"


class Screen:
    """A terminal of 120 columns: what a process writes to it."""

    def __init__(self) -> None:
        self._ours, self.theirs = os.openpty()
        self.text = ""
        asyncio.get_running_loop().add_reader(self._ours, self._read)

    @property
    def plain(self) -> str:
        """Without colours and movements."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text)

    def _read(self) -> None:
        try:
            self.text += os.read(self._ours, 65536).decode(errors="replace")
        except OSError:  # the last process that had it open has ended
            asyncio.get_running_loop().remove_reader(self._ours)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._ours)
        os.close(self._ours)
        os.close(self.theirs)


@pytest.fixture
async def screen():
    screen = Screen()
    yield screen
    screen.close()


async def test_rollouts_are_shown_on_a_terminal_as_they_come(site, screen):
    branches, generate = asyncio.Event(), site.engine.generate

    async def generate_in_order(rid, *request):
        if int(rid.rsplit("/", 1)[1]) >= 3:
            await branches.wait()
        return await generate(rid, *request)

    site.engine.generate = generate_in_order
    site.engine.write = lambda ids, number: f"{NASTY[:-1]}{number % 2}"
    words = ["sample", "--server", site.target, "--prompt=Go", "--answer=1"]
    async with command(*words, stdout=screen.theirs) as process:
        # of rollouts 0, 1 and 2 the second is right
        await until(lambda: re.search(r"3/6 .*mean reward 0\.33", screen.plain), 30)
        await until(lambda: re.search(r"round 1 .* 1\.00 .*\\x00\\n\\n#### 1", screen.plain))
        assert "IB-Score" not in screen.text
        branches.set()
        assert (await ended(process)).code == 0
    await until(lambda: "complete: 6 trajectories" in screen.text)
    assert "\x1b[2J" not in screen.text and "\x1b]0;" not in screen.text


@pytest.mark.parametrize("how", ["pipe", "json", "terminal"])
async def test_ctrl_c_cancels_the_call(site, screen, how):
    site.engine.go_on.clear()
    words = ["sample", "--server", site.target, "--prompt=Go", "--answer=1"]
    words += ["--json"] if how == "json" else []
    stdout = {"stdout": screen.theirs} if how == "terminal" else {}
    async with command(*words, **stdout) as process:
        await until(lambda: len(site.engine.running) == 3, 30)
        process.send_signal(signal.SIGINT)
        code, out, err = await ended(process)
    assert (code, out, err) == (130, "", "ibtpo: interrupted\n")
    await until(lambda: not site.engine.running and site.sampling.interactive == 0)
    site.engine.go_on.set()
    await site.still_serves()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rounds=0"], "ibtpo: rounds: got 0; allowed: "),
        (["--rounds=two"], "ibtpo sample: argument --rounds: invalid int value: 'two'; see "),
        (["--round-s=2"], "ibtpo: unrecognized arguments: --round-s=2; see ibtpo --help"),
        (["--top-p=1.5"], "ibtpo: sampling.top_p: got 1.5; allowed: "),
        (["--beta=nan"], "ibtpo: beta: got nan; allowed: "),
        (["--strategy=best\x1b"], "options.strategy: unknown strategy"),
        (["--grader=nobody"], "INVALID_ARGUMENT: grader: unknown grader 'nobody'; allowed: "),
        (["--init-rollouts=4096"], "at most 40 (the server's --limit-trajectories)"),
        (["--stop=" + "x" * 300], "ibtpo: sampling.stop: characters: got 300; allowed: "),
        (["--prompt="], "INVALID_ARGUMENT: prompt: empty; allowed: "),
        (["--prompt=-"], "ibtpo: prompt: 'utf-8' codec can't decode byte 0xff"),
        (["--answer=\udcff"], "ibtpo: answer: 'utf-8' codec can't decode byte 0xff"),
        (["--timeout-s=-1"], "DEADLINE_EXCEEDED"),
        (["--server=127.0.0.1:1"], "UNAVAILABLE: no server answers there; start ibtpo-server"),
    ],
)
async def test_bad_input_is_one_line(site, words, said, monkeypatch, capsys):
    def refused() -> str:
        with pytest.raises(SystemExit) as caught:
            main(["sample", "--server", site.target, "--prompt=Go", "--answer=1", *words])
        return caught.value.code  # the interpreter prints it and exits 1

    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"\xff")))
    message = await asyncio.to_thread(refused)
    assert said in message
    assert printable(message) == message
    assert capsys.readouterr() == ("", "")


async def test_the_line_goes_to_stderr_with_exit_code_1(site):
    words = ["sample", "--server", site.target, "--prompt=Go", "--answer=1", "--rounds=0"]
    code, out, err = await ibtpo(*words)
    assert (code, out) == (1, "")
    assert err.startswith("ibtpo: rounds: got 0; allowed: ") and err.count("\n") == 1
