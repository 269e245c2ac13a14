"""A tree in the terminal: its steps, indented where it branches."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree as Branches

from ibtree.cli.live import reward_text
from ibtree.messages import Chat
from ibtree.text import printable
from ibtree.tree import Finish, Floats, Tree
from ibtree.tree.score import confidences, ib_scores, values

_COLUMNS = (("draws", "bold"), ("value", "cyan"), ("confidence", "dim"), ("IB-Score", "magenta"))
_GUIDE_CELLS, _ROW_CELLS = 4, 56


def print_tree(tree: Tree, content: str | Sequence[int] | Chat) -> None:
    """Prints the steps, then one line of what the tree cost and why it ended. `content`: the
    prompt's."""
    asked = content.messages[-1].content if isinstance(content, Chat) else str(content)
    branches, depth = _branches(tree, asked)
    console = Console(highlight=False)
    # a deep tree is folded by the terminal rather than squeezed
    console.width = max(console.width, depth * _GUIDE_CELLS + _ROW_CELLS)
    console.print(Text(", ").join([*(Text(name, style) for name, style in _COLUMNS), Text("step")]))
    console.print(branches)
    console.print(Text(summary(tree)), soft_wrap=True)


def summary(tree: Tree) -> str:
    """Ledger and stop cause."""
    cost, first = tree.ledger, tree.first_round_reward
    mean = f"mean reward {tree.rewards().mean():.2f}"
    if first is not None:
        mean += f" (first round {first:.2f})"
    return (
        f"{tree.stop_cause.name.lower()}: {tree.trajectories} trajectories, {mean}; "
        f"{cost.generated_tokens} tokens generated, {tree.unique_tokens} unique; "
        f"{cost.prefix_tokens} prefix tokens, {cost.cached_tokens} cached, "
        f"{cost.refilled_tokens} refilled; {cost.wall_s:.2f} s, {cost.queue_s:.2f} s queued"
    )


def _branches(tree: Tree, asked: str) -> tuple[Branches, int]:
    """A run of steps without a branch is one label; returns the depth in branches with it."""
    rows = _Rows(tree, asked)
    top, deepest = Branches(rows.of([0]), guide_style="dim"), 0
    waiting = [(child, top, 1) for child in reversed(tree.children(0))]
    while waiting:
        node, above, depth = waiting.pop()
        run = [node]
        while len(below := tree.children(run[-1])) == 1:
            run.append(below[0])
        branch = above.add(rows.of(run))
        deepest = max(deepest, depth)
        waiting += [(child, branch, depth + 1) for child in reversed(below)]
    return top, deepest


class _Rows:
    """A table row for each step."""

    def __init__(self, tree: Tree, asked: str) -> None:
        self._tree = tree
        self._texts = [asked, *tree.texts[1:]]
        self._value = values(tree, tree.options.value_estimator)
        self._confidence = confidences(tree, tree.options.confidence)
        self._score: Floats = ib_scores(tree)

    def of(self, run: Sequence[int]) -> Table:
        table = Table.grid(padding=(0, 1))
        for width in (4, 4, 4, 6):
            table.add_column(justify="right", min_width=width, no_wrap=True)
        table.add_column()
        for n in run:
            figures = (
                f"{self._tree.draws[n]}×" if n else "",
                f"{self._value[n]:.2f}",
                f"{self._confidence[n]:.2f}" if n else "",
                "" if self._tree.is_leaf(n) else f"{self._score[n]:+.2f}",
            )
            styled = (Text(f, style) for f, (_, style) in zip(figures, _COLUMNS, strict=True))
            table.add_row(*styled, Text(printable(self._texts[n])) + self._end(n))
        return table

    def _end(self, n: int) -> Text:
        """What became of the rollouts that end here."""
        if not self._tree.ends[n]:
            return Text()
        more = f" ×{self._tree.ends[n]}" if self._tree.ends[n] > 1 else ""
        cut = " cut by the limit" if self._tree.finishes[n] is Finish.LENGTH else ""
        return Text(" ⇒ ") + reward_text(self._tree.reward(n)) + Text(more + cut, style="dim")
