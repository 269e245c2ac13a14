"""What is shown while a tree grows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from ibtree.messages import Expansion, Progress
from ibtree.text import printable

_SHOWN_ROLLOUTS = 6
_FIGURE_CELLS = 24


class GrowthView:
    """A bar of trajectories, the last rollouts, and the running mean reward."""

    def __init__(self) -> None:
        self._bar = Bar(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("trajectories  mean reward {task.fields[mean]}"),
            TimeElapsedColumn(),
        )
        self._task = self._bar.add_task("", total=None, mean="-")
        self._last: tuple[Expansion, ...] = ()
        self._rewards: list[float] = []
        self._progress = ""

    def add(self, event: Expansion | Progress) -> None:
        if isinstance(event, Progress):
            self._progress = (
                f"{event.rollouts_in_flight} in flight, {event.generated_tokens} tokens so far"
            )
            self._bar.update(self._task, total=event.target_trajectories)
            return
        self._progress = ""
        self._rewards.append(event.reward)
        self._last = (*self._last, event)[-_SHOWN_ROLLOUTS:]
        self._bar.update(
            self._task,
            total=event.target_trajectories,
            completed=event.trajectories,
            mean=f"{sum(self._rewards) / len(self._rewards):.2f}",
        )

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        yield self._bar
        table = Table.grid(padding=(0, 1))
        for _figure in range(3):
            table.add_column(justify="right", no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis")
        room = max(options.max_width - _FIGURE_CELLS, 8)
        for event in self._last:
            text = printable(event.text[-room:])  # the end, where the answer is
            table.add_row(
                Text(f"round {event.round}"),
                Text(f"{event.generated_tokens} tok"),
                reward_text(event.reward),
                Text(text if len(text) <= room else f"…{text[1 - room :]}"),
            )
        yield table
        if self._progress:
            yield Text(self._progress, style="dim")


def reward_text(reward: float) -> Text:
    """A reward as text, green where it is good."""
    return Text(f"{reward:.2f}", style="green" if reward >= 0.5 else "red")


@contextmanager
def growth(console: Console) -> Iterator[GrowthView]:
    """A view that keeps itself up to date, and leaves nothing behind."""
    view = GrowthView()
    with Live(view, console=console, transient=True):
        yield view
