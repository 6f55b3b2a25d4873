"""The comparison: check everything, run what is not finished, and write down what came out.

FOLDER/experiment.yaml        resolved: every default written out, revisions, versions, machine
FOLDER/cells/CELL/            one folder for each run (see cell.py)
FOLDER/results.csv  report.html  plots/
"""

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from deltatune.comparing.cell import EVENTS, read_data
from deltatune.comparing.experiment import Cell, Experiment
from deltatune.comparing.processes import CellProcesses, finished, outcome
from deltatune.comparing.records import write_tables
from deltatune.comparing.report import check_installed, write_report
from deltatune.comparing.results import CellResult, FailedCell
from deltatune.data import DialogueData, TextData
from deltatune.errors import UserError
from deltatune.files import disk_errors, write_text
from deltatune.models.attach import attach
from deltatune.models.base import Place, find_base, outline
from deltatune.training.events import Event, read_events
from deltatune.training.precision import resolve

Watcher = Callable[[Cell, Event | CellResult | FailedCell], None]
"""Is told of each cell's events as they happen, and then of what came out of it."""


@dataclass(frozen=True)
class Comparison:
    """What a comparison found and where it is written down."""

    folder: Path
    results: list[CellResult]
    failed: list[FailedCell]
    report: Path


def compare(experiment: Experiment, folder: Path | str, watch: Watcher = lambda cell, news: None) -> Comparison:
    """Runs every cell that is not finished yet and writes results.csv and report.html.

    Everything that can be wrong is looked for first: base, data, hyperparameters and targets of every method. A cell
    that fails is noted with its reason, and the others go on. Raises `UserError` for what is wrong beforehand.
    """
    check_installed()
    folder = Path(folder)
    place = find_base(experiment.base)
    data = read_data(experiment.cells()[0])
    matched = _check_methods(experiment, place, data)
    with _alone(folder):
        return _run(experiment, folder, watch, place, data, matched)


def _run(
    experiment: Experiment,
    folder: Path,
    watch: Watcher,
    place: Place,
    data: TextData | DialogueData,
    matched: Mapping[str, str],
) -> Comparison:
    cells = experiment.cells(place.id, place.revision, data.revision)
    resolved = _resolved(experiment, cells, place, data, matched)
    write_text(folder / "experiment.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True, width=120))

    results: list[CellResult] = []
    failed: list[FailedCell] = []
    curves: dict[tuple[str, int], list[Event]] = {}
    with CellProcesses(folder / "cells") as processes:
        for cell in cells:
            cell_folder = folder / "cells" / cell.id
            kept = finished(cell_folder)
            if kept is None:
                for event in processes.run(cell):
                    watch(cell, event)
            result = kept or outcome(cell, cell_folder)
            watch(cell, result)
            if isinstance(result, FailedCell):
                failed.append(result)
                continue
            results.append(result)
            curves[cell.method.label, cell.seed] = list(read_events(cell_folder / EVENTS))
    write_tables(folder, results, failed)
    report = write_report(folder, resolved, results, failed, curves)
    return Comparison(folder, results, failed, report)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps a second comparison from writing to the same folder meanwhile."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            hint = "wait for it to end, or choose another folder with --out"
            raise UserError(f"another comparison is running in {folder}", hint) from None
    try:
        yield
    finally:
        lock.release()


def _check_methods(experiment: Experiment, place: Place, data: TextData | DialogueData) -> dict[str, str]:
    """Attaches every method to the base's outline, so that a wrong target is refused before anything trains.

    Gives what each method matched, in words.
    """
    matched = {}
    for choice in experiment.methods:
        try:
            model = attach(outline(place, labels=data.labels, storage=choice.storage), choice.make())
        except UserError as error:
            raise UserError(f"{choice.label}: {error.message}", error.hint) from error
        matched[choice.label] = "\n".join(map(str, model.attachment.parts))
    return matched


def _resolved(
    experiment: Experiment, cells: list[Cell], place: Place, data: TextData | DialogueData, matched: Mapping[str, str]
) -> dict[str, Any]:
    plain: dict[str, Any] = experiment.model_dump(mode="json")
    plain["resolved"] = {
        "base": {"id": place.id, "revision": place.revision or "a local folder"},
        "data": {
            "name": data.name,
            "revision": data.revision,
            "labels": list(data.labels),
            "train": len(data.train),
            "validation": len(data.validation),
            "test": len(data.test),
            "splitting": data.splitting,
            "duplicates dropped": data.duplicates,
            "incomplete rows dropped": data.incomplete,
        },
        "learning rates": {cell.method.label: cell.training.learning_rate for cell in cells},
        "precision": resolve(experiment.training.precision),
        "targets": dict(matched),
        "versions": {name: version(name) for name in ("deltatune", "torch", "transformers", "tokenizers", "datasets")},
        "machine": _machine(),
    }
    return plain


def _machine() -> dict[str, Any]:
    features = torch.cpu.get_capabilities()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "processor": features.get("cpu_name") or platform.processor() or "unknown",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16 in hardware": resolve("auto") == "bf16",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
