"""The demo's HTML report, built from a small tree and made-up figures."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ibtree.tree import Finish, Step, Tree, score
from tests import ROOT

ARITH = ROOT / "examples" / "arith"
PHASES = ("sample", "learn", "checkpoint", "publish")
VOID = {"meta", "br", "img", "link", "input"}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example is a folder of scripts, not a package."""
    monkeypatch.syspath_prepend(str(ARITH))
    for name in ("report", "tree_svg"):
        monkeypatch.delitem(sys.modules, name, raising=False)


class Page(HTMLParser):
    """The page's words, tags and attributes; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def count(self, tag: str) -> int:
        return sum(t == tag for t, _ in self.tags)


def grown(texts: list[list[str]], rewards: list[float]) -> tuple[Tree, list[str]]:
    tree = Tree(prompt=(1,))
    for steps, reward in zip(texts, rewards, strict=True):
        spans = [Step(tuple(s.encode()), (-0.3,) * len(s), (0,) * len(s)) for s in steps]
        tree.insert(0, spans, reward, Finish.STOP if reward else Finish.LENGTH)
    return tree, [bytes(step.token_ids).decode() for step in tree.steps]


TEXTS = [["3+4\n=7\n\n", "#### 7"], ["3+4\n=7\n\n", "#### 2"], ["3+4\n=6\n\n", "#### 6"]]


def step_row(step: int, **figures: float | None) -> dict[str, Any]:
    seconds = {f"seconds_{phase}": 0.5 for phase in PHASES}
    row = {"reward": 0.5, "first_round_reward": 0.4, "eff_rate": 1.0, "balance": 0.01}
    gap = {"log_prob_gap_mean": 1e-7, "log_prob_gap_max": 3e-6, "tokens": 100.0 * step}
    return {"kind": "step", "step": step, "at_s": 1.0, **row, **gap, **seconds, **figures}


def eval_row(step: int, mean: float) -> dict[str, Any]:
    interval = {"accuracy": mean, "accuracy_low": mean - 0.05, "accuracy_high": mean + 0.05}
    return {"kind": "eval", "step": step, "at_s": 1.0, **interval, "problems": 64.0}


ROWS = [eval_row(0, 0.25), step_row(1), step_row(2), step_row(3), eval_row(3, 0.75)]
SUMMARY: dict[str, object] = {"accuracy_before": 0.25, "accuracy_after": 0.75, "seconds": 61.4}


def written(
    folder: Path,
    rows: dict[str, list[dict[str, Any]]],
    texts: list[list[str]] = TEXTS,
    summary: dict[str, object] = SUMMARY,
) -> tuple[str, Page, Tree]:
    from report import Run, write_report

    rewards = [1.0, *[0.0] * (len(texts) - 1)]
    tree, step_texts = grown(texts, rewards)
    runs = [Run(name, run_rows) for name, run_rows in rows.items()]
    write_report(folder / "r.html", runs, tree, step_texts, "3+4=?\n", summary)
    text = (folder / "r.html").read_text(encoding="utf-8")
    return text, Page(text), tree


def test_the_page_tells_every_node_and_figure(tmp_path: Path) -> None:
    text, page, tree = written(tmp_path, {"IB-TPO": ROWS, "GRPO": ROWS})
    words = "".join(page.words)
    assert "Held-out accuracy 25.0\u202f% → 75.0\u202f%" in words and "Seconds in all61.4" in words
    assert "Accuracy of GRPO at its end75.0\u202f%" in words
    nodes = re.findall(r'<g role="listitem".*?</g>', text, re.DOTALL)
    assert len(nodes) == len(tree) == 6
    value, confidence = score.values(tree, "mean"), score.confidences(tree, "geometric")
    assert tree.options.value_estimator == "mean" and tree.options.confidence == "geometric"
    scores = score.ib_scores(tree)
    for n in range(len(tree)):
        raw = "3+4=?\n" if n == 0 else bytes(tree.steps[n].token_ids).decode()
        shown = raw.replace("\n", "↵").replace(" ", "·")
        node = next(
            "".join(Page(svg).words)
            for svg in nodes
            if f">{shown}</tspan>" in svg and f"visits {tree.visits[n]}<" in svg
        )
        assert f"value {value[n]:.2f}" in node and f"conf {confidence[n]:.2f}" in node
        assert n == 0 or f"draws {tree.draws[n]} " in node
        if tree.is_leaf(n):
            assert f"reward {tree.reward(n):g} ×1" in node and "IB" not in node
            assert ("cut" in node) == (tree.reward(n) == 0)
        else:
            assert f"IB {scores[n]:.2f}".replace("-", "−") in node
    assert text.count('class="edge" stroke-width="10.0"') == 1  # one edge was drawn most


def test_the_page_needs_nothing_from_outside_and_can_be_read_aloud(tmp_path: Path) -> None:
    text, page, _ = written(tmp_path, {"IB-TPO": ROWS})
    assert not re.search(r"https?:|//|url\(|@import", text)
    assert not page.count("script") and not page.count("link") and not page.count("img")
    for tag, attributes in page.tags:
        assert not {"src", "href", "srcset"} & set(attributes)
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    assert "prefers-color-scheme:dark" in text
    gap = next(a["aria-label"] for _, a in page.tags if "gap" in (a.get("aria-label") or ""))
    assert gap is not None and "IB-TPO mean: first 1e-07, last 1e-07." in gap


def test_nulls_and_missing_figures(tmp_path: Path) -> None:
    nothing = dict.fromkeys(k for k in step_row(1) if k not in ("kind", "step"))
    gaps = [step_row(1), step_row(2, reward=None, log_prob_gap_mean=0.0), step_row(3)]
    bare = [{"kind": "step", "step": 1, "tokens": 5.0}]
    for rows in ([*gaps, eval_row(3, 0.5)], [step_row(1, **nothing)], bare, []):
        text, page, _ = written(tmp_path, {"IB-TPO": rows}, summary={"eff_rate": None, "x_y": 2e-7})
        words = "".join(page.words)
        assert "Held-out accuracy – → –" in words and "X y2.0 × 10−7" in words
        assert not re.search(r"\b(nan|None|inf)\b", text)
    text, _, _ = written(tmp_path, {"IB-TPO": gaps})
    reward = text.split("<figcaption>Training reward")[1].split("</figure>")[0]
    assert re.search(r' d="M[\d. ]+M[\d. ]+"', reward)  # broken in the middle, not bridged


def test_what_comes_from_data_is_escaped(tmp_path: Path) -> None:
    bad = "<script>alert('&')</script>"
    text, page, _ = written(tmp_path, {bad: ROWS}, [[bad], ["a\x00\tb"], ["x" * 200]], {bad: bad})
    assert "<script" not in text and not page.count("script")
    words = "".join(page.words)
    assert bad in words and bad[:17] in page.words and "a␀⇥b" in words
    assert "x" * 200 in words and "x" * 16 + "…" in page.words  # all of it in the tooltip


def test_nodes_do_not_overlap_and_merged_ones_are_left_out() -> None:
    from tree_svg import grid_positions, tree_svg

    tree, _ = grown([["ab", "c"], ["a", "b"], ["ad"]], [1.0, 0.0, 0.0])
    tree.split(1, 1)  # the rest of "ab" is merged into "b"
    tree.validate()
    alive = [n for n in range(len(tree)) if tree.alive(n) == n]
    positions = grid_positions(tree)
    assert sorted(positions) == alive and len(alive) == len(tree) - 1
    for column in {c for c, _ in positions.values()}:
        rows = sorted(r for c, r in positions.values() if c == column)
        assert all(b - a >= 1 for a, b in pairwise(rows))
    assert tree_svg(tree, ["t"] * len(tree)).count('role="listitem"') == len(alive)
    assert 'role="listitem"' in tree_svg(Tree(prompt=(1,)), ["p"])  # not grown yet
