"""The demo's report: one HTML file with the curves of its runs and a grown tree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from tree_svg import DARK, LIGHT, shade, tree_svg, visible

from ibtree import Tree


@dataclass
class Run:
    """A run's name and the rows of its metrics.jsonl."""

    name: str
    rows: list[dict[str, Any]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == kind]

    def summary(self) -> dict[str, Any]:
        """Accuracy before and after, and means over the steps; None for a gap never measured."""
        steps, evals = self.of("step"), self.of("eval")
        gaps = [row["log_prob_gap_mean"] for row in steps if row["log_prob_gap_mean"] is not None]
        return {
            "accuracy_before": evals[0]["accuracy"],
            "accuracy_after": evals[-1]["accuracy"],
            "accuracy_after_low": evals[-1]["accuracy_low"],
            "accuracy_after_high": evals[-1]["accuracy_high"],
            "problems": evals[-1]["problems"],
            "steps": len(steps),
            "eff_rate": sum(row["eff_rate"] for row in steps) / len(steps),
            "generated_tokens": steps[-1]["tokens"],
            "log_prob_gap_mean": sum(gaps) / len(gaps) if gaps else None,
            "log_prob_gap_worst_step": max(gaps, default=None),
        }


@dataclass
class Series:
    """A curve in one of the page's five colours with its intervals, or one layer of a stack."""

    label: str
    colour: int
    points: list[tuple[float, float | None]]
    spread: list[tuple[float, float, float]] = field(default_factory=list)  # x, low, high
    dashed: bool = False


W, H, LEFT, RIGHT, TOP, BOTTOM = 440, 250, 46, 12, 8, 40
PHASES = ("sample", "learn", "publish", "checkpoint", "evaluate")
LABELS = {
    "accuracy_before": "Held-out accuracy before",
    "accuracy_after": "Held-out accuracy after",
    "accuracy_after_low": "… 95 % interval from",
    "accuracy_after_high": "… 95 % interval to",
    "accuracy_gain": "Gain, paired by problem",
    "accuracy_gain_low": "… 95 % interval from",
    "accuracy_gain_high": "… 95 % interval to",
    "problems": "Held-out problems",
    "seconds": "Seconds in all",
    "steps": "Optimiser steps",
    "eff_rate": "Eff-Rate (trees whose rewards differ)",
    "generated_tokens": "Generated tokens",
    "log_prob_gap_mean": "Log-probability gap, mean [nats]",
    "log_prob_gap_worst_step": "… in the worst step [nats]",
}
TERMS = {
    "draws": "times sampled from the step before",
    "visits": "trajectories through it",
    "value": "estimated chance of a right answer",
    "conf": "the policy's confidence in the step",
    "IB": "IB-Score: branches start where it is highest",
    "starts": "rollouts that started from its end",
    "reward ×n": "of the n trajectories that end there",
    "cut": "they ended at the length limit",
}


def label(key: str) -> str:
    return LABELS.get(key) or key[:1].upper() + key[1:].replace("_", " ")


def shown(key: str, value: Any) -> str:
    """A figure as people read it; a dash for null."""
    if not isinstance(value, int | float):
        return "–" if value is None else escape(str(value))
    if not math.isfinite(value):
        return "–"
    if key.startswith(("accuracy", "eff_rate")):
        return f"{100 * value:.1f}\u202f%"
    if 0 < abs(value) < 1e-3:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits} × 10<sup>{int(exponent)}</sup>".replace("-", "−")
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def ticks(low: float, high: float, least: float = 0.0) -> list[float]:
    """About five round numbers that enclose [low, high], at least `least` apart."""
    raw = max((high - low) / 5, least, 1e-9)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 5) if m * power >= raw * 0.999), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def tick_label(value: float, log: bool = False) -> str:
    if log:
        return "10" + str(round(value)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.4g}".replace("-", "−")


def chart(title: str, x_label: str, series: list[Series], log: bool = False) -> str:
    """A curve or stack with its legend; drawn by hand, so that it follows the page's colours."""

    def scaled(y: float | None) -> float:
        """NaN for what cannot be drawn: null, and 0 on a log axis."""
        if y is None or (log and y <= 0):
            return math.nan
        return math.log10(y) if log else y

    stacked = all(not s.points for s in series)
    xs = [x for s in series for x in (*(p[0] for p in s.points), *(p[0] for p in s.spread))]
    ys = [scaled(y) for s in series for _, y in s.points]
    ys += [scaled(y) for s in series for _, *ends in s.spread for y in ends]
    ys = [y for y in ys if math.isfinite(y)]
    head = f"<figure><figcaption>{escape(title)}</figcaption>"
    if not ys:
        return f"{head}<p>No figures.</p></figure>"
    y_ticks = ticks(min(ys), max(ys), least=1.0 if log else 0.0)
    x0, x1 = min(xs) - stacked / 2, max(max(xs) + stacked / 2, min(xs) + 1)
    bar = 0.8 * (W - LEFT - RIGHT) / (x1 - x0) if stacked else 2.0  # thickness of an interval

    def px(x: float) -> str:
        return f"{LEFT + (x - x0) / (x1 - x0) * (W - LEFT - RIGHT):.1f}"

    def py(y: float) -> str:
        part = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return f"{H - BOTTOM - part * (H - TOP - BOTTOM):.1f}"

    out, keys, spoken = [], [], [f"{title}, against {x_label}."]
    for t in y_ticks:
        out.append(f'<path class="grid" d="M{LEFT} {py(t)}H{W - RIGHT}"/>')
        out.append(f'<text class="y" x="{LEFT - 7}" y="{py(t)}">{tick_label(t, log)}</text>')
    x_ticks = [t for t in ticks(x0, x1, least=1.0) if x0 <= t <= x1]
    out += [f'<text x="{px(t)}" y="{H - 23}">{tick_label(t)}</text>' for t in x_ticks]
    out.append(f'<text x="{(LEFT + W - RIGHT) / 2:g}" y="{H - 5}">{escape(x_label)}</text>')
    for s in series:
        style = " dashed" * s.dashed
        square = " square" * stacked
        keys.append(f'<span class="key c{s.colour}{style}{square}">{escape(s.label)}</span>')
        known = [y for _, y in s.points if y is not None] or [
            high - low for _, low, high in s.spread
        ]
        spoken.append(f"{s.label}: first {known[0]:.3g}, last {known[-1]:.3g}.")
        bars = "".join(f"M{px(x)} {py(low)}V{py(high)}" for x, low, high in s.spread)
        out.append(
            f'<g class="c{s.colour}"><path class="line" stroke-width="{bar:.1f}" d="{bars}"/>'
        )
        path, pen = "", "M"
        for x, known_y in s.points:
            if math.isnan(scaled(known_y)):
                pen = "M"  # a null breaks the line
                continue
            path, pen = f"{path}{pen}{px(x)} {py(scaled(known_y))}", "L"
            tip = f"<title>{escape(s.label)}, {escape(x_label)} {x:,.0f}: {known_y:.4g}</title>"
            out.append(f'<circle cx="{px(x)}" cy="{py(scaled(known_y))}" r="2.4">{tip}</circle>')
        out.append(f'<path class="line{style}" stroke-width="1.8" d="{path}"/></g>')
    return (
        f'{head}<div class="keys">{"".join(keys)}</div><svg viewBox="0 0 {W} {H}" role="img" '
        f'aria-label="{escape(" ".join(spoken))}">{"".join(out)}</svg></figure>'
    )


def curves(runs: Sequence[Run], *keys: tuple[str, str]) -> list[Series]:
    """A figure's series for each run that has it: (its key, its name if there are several)."""
    series = []
    for i, run in enumerate(runs):
        for j, (key, name) in enumerate(keys):
            points = [(row["step"], row.get(key)) for row in run.of("step")]
            if any(y is not None for _, y in points):
                series.append(Series(f"{run.name} {name}".strip(), i, points, dashed=j > 0))
    return series


def accuracy(runs: Sequence[Run], against: str) -> list[Series]:
    """Held-out accuracy against "tokens" or "step"; the tokens are those of the step before."""
    series = []
    for i, run in enumerate(runs):
        steps = [row for row in run.of("step") if row.get(against) is not None]
        x_of_step = {0: 0.0} | {row["step"]: row[against] for row in steps}
        s = Series(run.name, i, [])
        for row in run.of("eval"):
            if row["accuracy"] is not None and row["step"] in x_of_step:
                s.points.append((x_of_step[row["step"]], row["accuracy"]))
                low_high = row["accuracy_low"], row["accuracy_high"]
                s.spread.append((x_of_step[row["step"]], *low_high))
        series.append(s)
    return series


def seconds(run: Run) -> list[Series]:
    """The phases of each step on top of one another."""
    rows = run.of("step")
    below, layers = [0.0] * len(rows), []
    for colour, phase in enumerate(PHASES):
        if not any(row.get(f"seconds_{phase}") for row in rows):
            continue
        top = [b + (r.get(f"seconds_{phase}") or 0.0) for b, r in zip(below, rows, strict=True)]
        spread = [(r["step"], a, b) for r, a, b in zip(rows, below, top, strict=True)]
        layers.append(Series(phase, colour, [], spread))
        below = top
    return layers


def write_report(
    path: Path,
    runs: Sequence[Run],
    tree: Tree,
    step_texts: Sequence[str],
    prompt_text: str,
    summary: dict[str, object],
) -> None:
    """Writes the page; `step_texts[n]` is the text of the tree's node n (the root's is unused)."""
    before, after = (shown("accuracy", summary.get(f"accuracy_{x}")) for x in ("before", "after"))
    others = {
        f"accuracy of {run.name} at its end": run.of("eval")[-1]["accuracy"]
        for run in runs[1:]
        if run.of("eval")
    }
    table = "".join(
        f'<tr><th scope="row">{escape(label(key))}</th><td>{shown(key, value)}</td></tr>'
        for key, value in (summary | others).items()
    )
    rewards = curves(runs, ("reward", ""), ("first_round_reward", "first round"))
    gaps = curves(runs, ("log_prob_gap_mean", "mean"), ("log_prob_gap_max", "largest"))
    eff_rates = curves(runs, ("eff_rate", ""))
    charts = [
        chart("Training reward", "step", rewards),
        chart("Eff-Rate: share of trees whose rewards differ", "step", eff_rates),
        chart("Balance of exploration and exploitation", "step", curves(runs, ("balance", ""))),
        chart("Log-probability gap, engine to learner [nats]", "step", gaps, log=True),
        *(chart(f"Seconds by phase, {run.name}", "step", seconds(run)) for run in runs),
    ]
    accuracies = (
        chart("Held-out accuracy, 95 % interval", "generated tokens", accuracy(runs, "tokens")),
        chart("Held-out accuracy, 95 % interval", "step", accuracy(runs, "step")),
    )
    terms = "".join(f"<div><dt>{term}</dt><dd>{TERMS[term]}</dd></div>" for term in TERMS)
    ramp = "".join(
        f'<i style="--light:{shade(LIGHT, i / 10)};--dark:{shade(DARK, i / 10)}"></i>'
        for i in range(11)
    )
    names = ", compared with ".join(escape(run.name) for run in runs)
    path.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{names}: {before} → {after}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><style>{CSS}</style></head><body><main>
<header><p class="over">Reinforcement learning with {names}</p>
<h1>Held-out accuracy {before} <span aria-label="to">→</span> <b>{after}</b></h1></header>
<section class="top"><table><thead><tr><th scope="col">Figure</th><th scope="col">Value</th>
</tr></thead><tbody>{table}</tbody></table>
{"".join(accuracies)}</section>
<section><h2>Curves</h2><div class="charts">{"".join(charts)}</div></section>
<section><h2>A grown tree</h2>
<p>The prompt <code>{escape(visible(prompt_text))}</code> and what was sampled after it:
{tree.trajectories} trajectories in {len(list(tree.topological()))} nodes, {tree.unique_tokens}
different tokens.</p>
<div class="legend"><span>value 0 <span class="ramp">{ramp}</span> 1</span>
<span><svg width="52" height="14" aria-hidden="true"><path class="edge" stroke-width="1.5"
d="M0 7H22"/><path class="edge" stroke-width="9" d="M28 7H50"/></svg> few, many draws</span>
<span><svg width="26" height="16" aria-hidden="true"><g class="node end"><rect x="2" y="2"
width="22" height="12" rx="3"/></g></svg> trajectories end here</span>
<span>↵ new line</span><span>· space</span></div><dl>{terms}</dl>
<div class="scroll" role="region" aria-label="The grown tree" tabindex="0">
{tree_svg(tree, [prompt_text, *step_texts[1:]])}</div></section></main></body></html>
""",
        encoding="utf-8",
    )


CSS = """
:root{--bg:#fff;--card:#f6f7f9;--ink:#1b1f24;--soft:#5a6472;--rule:#d9dde3;--edge:#9aa4b1;
--c0:#0072b2;--c1:#b84605;--c2:#007a59;--c3:#a34a7f;--c4:#7a6300}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--card:#1d2127;--ink:#e8eaed;--soft:#a3adba;
--rule:#363c45;--edge:#68727f;--c0:#56b4e9;--c1:#ff9a55;--c2:#3fc79a;--c3:#e59cc6;--c4:#dcc24a}}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}
.c4{color:var(--c4)}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1344px;margin:auto;padding:32px 28px}
.over{margin:0;color:var(--soft)}h1{margin:0 0 20px;font-size:34px;line-height:1.25}
h1 b{color:var(--c0)}h2{margin:36px 0 12px;font-size:21px}
.top{display:flex;flex-wrap:wrap;gap:16px;align-items:start}
.top figure{flex:1 1 380px;max-width:480px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin-right:24px}
th{font-weight:400;text-align:left;padding:4px 20px 4px 0}td{text-align:right;font-weight:600}
thead th{color:var(--soft);font-size:13px}thead th+th{text-align:right;padding-right:0}
tbody tr{border-top:1px solid var(--rule)}sup{line-height:0}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(400px,100%),1fr));gap:16px}
figure{margin:0;padding:14px 16px 10px;background:var(--card);border-radius:10px}
figcaption{font-weight:600}figure svg{display:block;width:100%}
figure text{font-size:12px;fill:var(--soft);text-anchor:middle}
figure text.y{text-anchor:end;dominant-baseline:central}
.grid{stroke:var(--rule)}.line{fill:none;stroke:currentColor}path.dashed{stroke-dasharray:5 4}
circle{fill:currentColor}
.keys{min-height:24px;font-size:13px}.key{margin-right:13px;white-space:nowrap}
.key::before{content:"";display:inline-block;width:18px;margin-right:5px;vertical-align:middle;
border-top:2.5px solid}.key.dashed::before{border-top-style:dashed}
.key.square::before{width:0;border:5px solid}
.legend{display:flex;flex-wrap:wrap;gap:6px 28px}.legend svg,.ramp{vertical-align:middle}
.ramp{display:inline-flex}.ramp i{width:14px;height:14px;background:var(--light)}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(380px,100%),1fr));gap:2px 24px;
font-size:14px}dl div{display:flex;gap:8px}dt{font-weight:600;white-space:nowrap}
dd{margin:0;color:var(--soft)}
.scroll{overflow-x:auto;padding:14px;border:1px solid var(--rule);border-radius:10px}
.tree{display:block}.tree text{font:11.5px system-ui,sans-serif;fill:var(--ink)}
.tree .step{font:600 12.5px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.edge{fill:none;stroke:var(--edge)}.node rect{fill:var(--light,var(--card));stroke:var(--edge)}
.node.end rect{stroke:var(--ink);stroke-width:2}
@media(prefers-color-scheme:dark){.node rect{fill:var(--dark,var(--card))}
.ramp i{background:var(--dark)}}
"""
