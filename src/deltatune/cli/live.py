"""A live table on stderr of every run of a comparison: state, step, loss, quality and the time left."""

from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from deltatune.comparing.progress import Progress
from deltatune.comparing.results import CellResult, Elsewhere, FailedCell, Trained
from deltatune.comparing.table import seconds
from deltatune.training.events import Event

if TYPE_CHECKING:  # the table is there before the seconds that torch and transformers take to import
    from deltatune.comparing.experiment import Cell

_COLOURS = {
    "waiting": "dim",
    "training": "cyan",
    "testing": "cyan",
    "done": "green",
    "done elsewhere": "green",
    "kept": "green",
    "failed": "red",
}
_AROUND = 7
"""Lines of the terminal that the rows of the table leave free."""


class LiveTable:
    """The runs of a comparison, a row each, while they go. Use it as a context manager, on a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False, emoji=False)
        self._runs: dict[object, Progress] = {}
        self._over = False
        self._spinner = Spinner("dots")
        self._live = Live(console=self._console, get_renderable=self._shown, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self._live.stop()

    def expect(self, cells: "Iterable[Cell]") -> None:
        """Lists the runs that are to come."""
        for cell in cells:
            self._of(cell)

    def watch(self, cell: "Cell", news: Event | Elsewhere | CellResult | FailedCell | Trained) -> None:
        """Listens to a comparison."""
        self._of(cell).hear(news)

    def say(self, words: str) -> None:
        """Leaves a line on the screen."""
        self._console.print(words, soft_wrap=True, markup=False)

    def _of(self, cell: "Cell") -> Progress:
        """The row of a run. The trials of a method share one, which shows the newest."""
        label, trial, sizes = cell.method.label, getattr(cell, "trial", None), cell.data.train
        if trial is not None:
            last = self._runs.get((label, "search"))
            if last is None or last.part != f"trial {trial}":
                last = self._runs[label, "search"] = Progress(label, f"trial {trial}")
            return last
        part = f"seed {cell.seed}" + (f", {cell.data.sizes[0]:,}" if isinstance(sizes, tuple) else "")
        return self._runs.setdefault((label, cell.seed, cell.data.sizes), Progress(label, part))

    def _shown(self) -> RenderableType:
        rows = list(self._runs.values())
        ended = sum(run.state not in ("waiting", "training", "testing") for run in rows)
        words = Text(f"{ended} of {len(rows)} runs" + (f", {seconds(left)} left" if (left := self._left()) else ""))
        self._spinner.update(text="writing the report" if ended and ended == len(rows) else "loading base and data")
        busy: list[RenderableType] = [] if self._over or any(r.state == "training" for r in rows) else [self._spinner]
        return Group(self._table(rows if self._over else self._window(rows)), words, *busy) if rows else Group(*busy)

    def _window(self, rows: list[Progress]) -> list[Progress]:
        """As many rows as the terminal has room for, those that run among them."""
        room = max(3, self._console.height - _AROUND)
        busy = next((place for place, run in enumerate(rows) if run.state in ("training", "testing")), 0)
        start = max(0, min(busy - room // 2, len(rows) - room))
        return rows[start : start + room]

    def _left(self) -> float | None:
        """Seconds until the end, if each run that waits takes as long as those so far did on average."""
        timed = [run.seconds + (run.left or 0.0) for run in self._runs.values() if run.state in ("training", "done")]
        waiting = sum(run.state == "waiting" for run in self._runs.values())
        now = sum(run.left or 0.0 for run in self._runs.values())
        return now + waiting * sum(timed) / len(timed) if timed and not self._over else None

    def _table(self, rows: list[Progress]) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("Method", "Run", "State"):
            table.add_column(name, overflow="fold")
        for name in ("Steps", "Loss", "Quality", "Time", "Left"):
            table.add_column(name, justify="right")
        for run in rows:
            steps: RenderableType = Text("")
            if run.state == "training":
                steps = Table.grid(padding=(0, 1))
                steps.add_row(ProgressBar(run.steps, run.step, width=10), f"{run.step}/{run.steps}")
            table.add_row(
                Text(run.label),
                Text(run.part),
                Text(run.reason or run.state, style=_COLOURS[run.state]),
                steps,
                "" if run.loss is None else f"{run.loss:.3f}",
                Text(run.quality),
                seconds(run.seconds) if run.seconds else "",
                "" if run.left is None else seconds(run.left),
            )
        return table
