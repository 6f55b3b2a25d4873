"""Running what is not finished yet, beside other processes that may run cells of the same folder.

Work comes in lanes: in each one thing follows another (the trials of a search), and between them nothing does. A
process takes the first thing that no other holds. What another one finished is read from its folder.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from deltatune.comparing.cell import FAILED, RESULT
from deltatune.comparing.experiment import Cell
from deltatune.comparing.locks import claimed
from deltatune.comparing.processes import CellProcesses, outcome
from deltatune.comparing.results import CellResult, Elsewhere, FailedCell, Trained, read_result
from deltatune.training.events import Event

Result = CellResult | Trained | FailedCell
News = Event | Elsewhere | Result
Watcher = Callable[[Cell, News], None]
"""Is told of each cell's events as they happen, and then of what came out of it; trials of a search are cells, too."""

_WAIT = 0.3
"""Seconds until a process that found everything taken looks again."""


class Lane(Protocol):
    """Things to run one after the other."""

    def next(self) -> Cell | None:
        """What comes next; None where nothing is left."""

    def take(self, result: Result) -> None:
        """Is given what came out of it."""


class Single:
    """A lane of one cell."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.result: Result | None = None

    def next(self) -> Cell | None:
        """The cell, until it has a result."""
        return None if self.result else self.cell

    def take(self, result: Result) -> None:
        """Keeps it."""
        self.result = result


def share(lanes: Sequence[Lane], processes: CellProcesses, watch: Watcher, began: float) -> None:
    """Runs all that the lanes have, but for what other processes run meanwhile: their results are waited for.

    `began` is the time at which the command did: what failed before is tried again.
    """
    while waiting := list(_left(lanes, processes.folder, watch, began)):
        for lane, cell in waiting:
            folder = processes.folder / cell.place
            with claimed(folder) as ours:
                if not ours:
                    continue
                if _known(cell, folder, began):  # somebody finished it since we looked
                    watch(cell, Elsewhere())
                else:
                    for event in processes.run(cell):
                        watch(cell, event)
                result = outcome(cell, folder)
            lane.take(result)
            watch(cell, result)
            break
        else:
            time.sleep(_WAIT)


def _left(lanes: Sequence[Lane], run: Path, watch: Watcher, began: float) -> Iterator[tuple[Lane, Cell]]:
    """Of each lane what comes next and has no result yet; results that are there are given to it."""
    for lane in lanes:
        while cell := lane.next():
            result = _known(cell, run / cell.place, began)
            if result is None:
                yield lane, cell
                break
            if _ended(run / cell.place) >= began:
                watch(cell, Elsewhere())
            lane.take(result)
            watch(cell, result)


def _ended(folder: Path) -> float:
    """When what came out of a cell was written down."""
    return max((folder / name).stat().st_mtime for name in (RESULT, FAILED) if (folder / name).is_file())


def _known(cell: Cell, folder: Path, began: float) -> Result | None:
    """What is known to have come out of a cell: its result, or a failure since then."""
    if result := read_result(folder / RESULT):
        return result
    failed = folder / FAILED
    return outcome(cell, folder) if failed.is_file() and failed.stat().st_mtime >= began else None
