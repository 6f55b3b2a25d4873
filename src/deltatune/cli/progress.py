"""A progress bar on stderr that listens to a run: steps, loss, rate and the time left."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from deltatune.comparing.quality import named
from deltatune.comparing.results import CellResult, Elsewhere, FailedCell, Trained
from deltatune.training.events import Evaluated, Event, Finished, Started, Step

if TYPE_CHECKING:  # the bar is there before the seconds that torch and transformers take to import
    from deltatune.comparing.experiment import Cell


@contextmanager
def waiting(words: str) -> Iterator[None]:
    """Shows on stderr, where that is a terminal, that something takes its time."""
    console = Console(stderr=True, highlight=False, emoji=False)
    if not console.is_terminal:
        yield
        return
    with console.status(words):
        yield


class RunProgress:
    """Shows one run after another; each leaves a line behind. Use it as a context manager.

    Where stderr is no terminal only the finished runs' lines are printed.
    """

    def __init__(self) -> None:
        console = Console(stderr=True, highlight=False, emoji=False)
        self._bar = Progress(
            TextColumn("{task.description}", table_column=Column()),  # wraps where the terminal is narrow
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._ran = self._elsewhere = False

    def __enter__(self) -> Self:
        self._bar.start()
        self._wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def watch(self, cell: "Cell", news: Event | Elsewhere | CellResult | FailedCell | Trained) -> None:
        """Listens to a comparison: a bar for the cell that runs, a line for each that is over."""
        trial = getattr(cell, "trial", None)
        name = f"{cell.method.label}, " + (f"seed {cell.seed}" if trial is None else f"trial {trial}")
        match news:
            case Elsewhere():
                self._elsewhere = True
            case CellResult():
                self._over(f"{name}: {named(news.metric).word} {news.quality:.1%} on test, {self._how(news)}")
            case Trained():
                self._over(
                    f"{name}: " + (news.reason or f"validation {named(news.metric).word} {abs(news.value or 0):.3f}")
                )
            case FailedCell():
                self._over(f"{name}: failed: {news.reason}" + (f"\n  hint: {news.hint}" if news.hint else ""))
            case _:
                self.show(name, news)

    def show(self, name: str, event: Event) -> None:
        """Shows an event of the run called `name`."""
        match event:
            case Started():
                self._clear()
                self._ran, self._validation = True, ""
                self._task = self._bar.add_task(name, total=event.steps, state="")
            case Step():
                speed = event.examples / event.seconds
                state = f"loss {event.loss:.3f}  {speed:.0f} ex/s{self._validation}"
                self._bar.update(self._task, completed=event.step, state=state)
            case Evaluated():
                self._validation = _validation(event.figures)
            case Finished():
                self._bar.update(self._task, state="testing and saving")

    def say(self, words: str) -> None:
        """Leaves a line on the screen."""
        self._bar.console.print(words, soft_wrap=True, markup=False)

    def _how(self, result: CellResult) -> str:
        if self._elsewhere:
            return "done meanwhile by another command"
        return f"{result.train_seconds:.0f} s of training" if self._ran else "kept from before"

    def _over(self, words: str) -> None:
        self.say(words)
        self._ran = self._elsewhere = False
        self._wait()

    def _wait(self) -> None:
        self._clear()
        self._bar.add_task("loading", total=None, state="libraries, base and data")

    def _clear(self) -> None:
        for task in self._bar.task_ids:
            self._bar.remove_task(task)


def _validation(figures: dict[str, float]) -> str:
    return f"  val {figures['accuracy']:.1%}" if "accuracy" in figures else f"  val loss {figures['loss']:.3f}"
