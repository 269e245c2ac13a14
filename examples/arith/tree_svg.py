"""A grown tree of reasoning steps as an inline SVG, laid out from left to right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from ibtree.tree import Finish, Tree, score

# A box and the gaps around it [px], and how much of a text it shows; the tooltip has all of it.
WIDTH, LINE, GAP_X, GAP_Y, PAD = 152, 15, 38, 12, 9
TEXT_CHARS, TEXT_LINES = 17, 3
RGB = tuple[int, int, int]
# Value 0, 0.5 and 1. Orange against blue-green stays apart for all common kinds of colour blindness
# (red against green does not), and the box's text keeps a contrast above 4.5 on every shade.
LIGHT: tuple[RGB, RGB, RGB] = ((250, 178, 140), (247, 243, 228), (124, 211, 182))
DARK: tuple[RGB, RGB, RGB] = ((140, 58, 22), (66, 66, 62), (10, 100, 78))


def visible(text: str) -> str:
    """The text with its white space and control characters shown as symbols."""
    named = {" ": "·", "\n": "↵", "\t": "⇥"}
    return "".join(named.get(c, chr(0x2400 + ord(c)) if c < " " else c) for c in text)


def number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}".replace("-", "−")


def shade(stops: tuple[RGB, RGB, RGB], value: float) -> str:
    """The colour of a value in [0, 1]."""
    low, high, part = (*stops[:2], 2 * value) if value < 0.5 else (*stops[1:], 2 * value - 1)
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(low, high, strict=True))


def grid_positions(tree: Tree) -> dict[int, tuple[int, float]]:
    """Column and row of each node: every leaf has a row, a parent is centred on its children."""
    depth, rows, order, stack = {0: 0}, dict[int, float](), [], [0]
    while stack:
        order.append(node := stack.pop())
        if tree.is_leaf(node):
            rows[node] = len(rows)
        for child in reversed(tree.children(node)):
            depth[child] = depth[node] + 1
            stack.append(child)
    for node in reversed(order):
        if kids := tree.children(node):
            rows[node] = (rows[kids[0]] + rows[kids[-1]]) / 2
    return {node: (depth[node], rows[node]) for node in order}


def tree_svg(tree: Tree, texts: Sequence[str]) -> str:
    """`texts[n]` is the text of node n; that of the root is the prompt."""
    value = score.values(tree, tree.options.value_estimator)
    confidence = score.confidences(tree, tree.options.confidence)
    ib = score.ib_scores(tree)
    positions = grid_positions(tree)
    shown = {n: visible(texts[n]) for n in positions}
    lines = {n: _lines(text) for n, text in shown.items()}
    height = LINE * (max(map(len, lines.values())) + 3) + 2 * PAD
    at = {
        n: (column * (WIDTH + GAP_X) + 2, row * (height + GAP_Y) + 2)
        for n, (column, row) in positions.items()
    }
    max_draws = max(tree.draws) or 1
    edges, boxes = [], []
    for n, (x, y) in at.items():
        if n:
            above = at[tree.parents[n]]
            x0, y0, y1, mid = above[0] + WIDTH, above[1] + height / 2, y + height / 2, x - GAP_X / 2
            edges.append(
                f'<path class="edge" stroke-width="{1 + 9 * tree.draws[n] / max_draws:.1f}" '
                f'd="M{x0:g} {y0:g}C{mid:g} {y0:g} {mid:g} {y1:g} {x:g} {y1:g}"/>'
            )
        facts = [
            (f"draws {tree.draws[n]}" if n else "prompt", f"visits {tree.visits[n]}"),
            (f"value {number(value[n])}", f"conf {number(confidence[n])}"),
            _last_line(tree, n, ib[n]),
        ]
        rows = [f'<tspan class="step">{escape(line)}</tspan>' for line in lines[n]]
        rows += [f'{left} <tspan x="{x + WIDTH / 2:g}">{right}</tspan>' for left, right in facts]
        text = "".join(
            f'<text x="{x + PAD:g}" y="{y + PAD + LINE * (i + 0.8):g}">{row}</text>'
            for i, row in enumerate(rows)
        )
        boxes.append(
            f'<g role="listitem" class="node{" end" if tree.ends[n] else ""}" style="--light:'
            f'{shade(LIGHT, value[n])};--dark:{shade(DARK, value[n])}"><title>{escape(shown[n])}'
            f'</title><rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{height}" rx="7"/>'
            f"{text}</g>"
        )
    w = max(x for x, _ in at.values()) + WIDTH + 2
    h = max(y for _, y in at.values()) + height + 2
    return (
        f'<svg class="tree" role="list" aria-label="The tree\'s {len(at)} nodes, parents first" '
        f'width="{w:g}" height="{h:g}" viewBox="0 0 {w:g} {h:g}">{"".join(edges + boxes)}</svg>'
    )


def _lines(text: str) -> list[str]:
    lines = [text[i : i + TEXT_CHARS] for i in range(0, len(text), TEXT_CHARS)] or ["(nothing)"]
    if len(lines) > TEXT_LINES:
        lines[TEXT_LINES - 1 :] = [lines[TEXT_LINES - 1][:-1] + "…"]
    return lines


def _last_line(tree: Tree, node: int, ib: float) -> tuple[str, str]:
    """IB-Score of an inner node and the rollouts that start there; the reward of an end."""
    inner = not tree.is_leaf(node)
    reward = ""
    if tree.ends[node]:
        cut = " cut" if tree.finishes[node] is Finish.LENGTH else ""
        reward = f"reward {tree.reward(node):.3g} ×{tree.ends[node]}{cut}"
    if not inner:
        return reward, ""
    return f"IB {number(ib)}", reward or (
        f"starts {tree.starts[node]}" if tree.starts[node] else ""
    )
