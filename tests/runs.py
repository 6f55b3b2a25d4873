"""Comparisons in folders of their own: started, waited for, looked at."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from command import Outcome, deltatune, write_reviews
from deltatune.comparing import compare
from deltatune.comparing.experiment import Cell
from deltatune.comparing.processes import CellProcesses
from deltatune.comparing.worker import attempt
from deltatune.files import write_json
from deltatune.training.events import Event
from tiny import save_tiny


@dataclass(frozen=True)
class Run:
    """A run's folder, and the words of the command that makes it."""

    folder: Path
    words: tuple[object, ...]

    def start(self, *more: object) -> Outcome:
        """Runs the command, or goes on with it, in this process."""
        return deltatune(*self.words, *more)

    def cell(self, label: str) -> Path:
        """The folder of the only cell of that name."""
        [folder] = (self.folder / "cells").glob(f"{label}-seed*")
        return folder

    def times(self, label: str) -> dict[Path, int]:
        """When each file of a cell was last written."""
        return {path: path.stat().st_mtime_ns for path in self.cell(label).rglob("*")}


@contextmanager
def in_this_process(*, report: bool = False) -> Iterator[list[str]]:
    """Cells and trials run in this process, whose imports are done; gives the list of those that did.

    Only with `report` is the report drawn as well.
    """

    def run(processes: CellProcesses, cell: Cell) -> list[Event]:
        folder, events = processes.folder / cell.place, []
        write_json(folder / "spec.json", cell.model_dump(mode="json"))
        ran.append(cell.id)
        attempt(folder, events.append)
        return events

    ran: list[str] = []
    with pytest.MonkeyPatch.context() as patch, nullcontext() if report else without_report():
        patch.setattr(CellProcesses, "run", run)
        yield ran


@contextmanager
def without_report() -> Iterator[None]:
    """Comparisons write their tables alone: drawing the report takes longer than a tiny cell."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "write_report", lambda folder, *_: folder / "report.html")
        yield


def write_run(place: Path, **content: Any) -> Run:
    """A tiny base, data and an experiment file with this content; nothing is started."""
    save_tiny(place / "base", "bert")
    data = write_reviews(place / "reviews.csv")
    whole = {"base": str(place / "base"), "data": str(data), **content}
    (place / "experiment.yaml").write_text(yaml.safe_dump(whole))
    return Run(place / "run", ("compare", place / "experiment.yaml", "--out", place / "run"))


def until(condition: Callable[[], Any], seconds: float = 400) -> Any:
    """Waits for the condition and returns what it gives."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def processes(folder: Path) -> list[int]:
    """The processes that the run in this folder keeps: one that forks, and one for a cell that runs."""
    return [
        pid for pid, words in _commands().items() if "deltatune.comparing.zygote" in words and str(folder) in words[-2]
    ]


def cell_processes(folder: Path) -> list[int]:
    """Those of them that run a cell: the forked ones."""
    every = processes(folder)
    return [pid for pid in every if _parent(pid) in every]


def _commands() -> dict[int, list[str]]:
    commands = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            commands[int(entry.name)] = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:  # it has ended
            continue
    return commands


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        return 0
