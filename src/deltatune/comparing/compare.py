"""The comparison: check everything, run what is not finished, and write down what came out.

FOLDER/experiment.yaml        resolved: every default written out, revisions, versions, machine
FOLDER/cells/CELL/            one folder for each run (see cell.py)
FOLDER/trials/TRIAL/          one folder for each trial of a search (see trial.py)
FOLDER/searches.json          what was searched, found and chosen
FOLDER/results.csv  results.parquet  results.md  report.html  plots/
"""

import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from deltatune.comparing.cell import EVENTS, read_data
from deltatune.comparing.experiment import Cell, Experiment
from deltatune.comparing.locks import writing
from deltatune.comparing.match import match
from deltatune.comparing.processes import CellProcesses
from deltatune.comparing.provenance import code_mark, different_code, versions
from deltatune.comparing.records import write_tables
from deltatune.comparing.report import check_installed, write_report
from deltatune.comparing.results import CellResult, FailedCell, Trained
from deltatune.comparing.search import Range, Search, write_searches
from deltatune.comparing.searching import SearchLane, Where
from deltatune.comparing.sharing import News, Single, Watcher, share
from deltatune.data import DialogueData, TextData
from deltatune.errors import UserError
from deltatune.files import disk_errors, write_text
from deltatune.models.attach import attach
from deltatune.models.base import outline
from deltatune.models.count import count
from deltatune.models.places import Place, find_base
from deltatune.training.events import Unplanned, read_events
from deltatune.training.precision import resolve

log = logging.getLogger("deltatune")

Finished = tuple[Path, CellResult]
"""A cell's folder and what came out of it."""


@dataclass(frozen=True)
class Comparison:
    """What a comparison found and where it is written down."""

    folder: Path
    results: list[CellResult]
    """Of the largest number of training examples, method by method: what the tables and the report compare."""
    failed: list[FailedCell]
    report: Path
    smaller: tuple[CellResult, ...] = ()
    """Of smaller numbers of training examples, for learning curves."""
    searches: tuple[Search, ...] = ()


def compare(
    experiment: Experiment, folder: Path | str, watch: Watcher = lambda cell, news: None, *, force: bool = False
) -> Comparison:
    """Runs every trial and cell that is not finished yet and writes results.csv and report.html.

    Everything that can be wrong is looked for first: base, data, hyperparameters and targets of every method. A cell
    that fails is noted with its reason, and the others go on. Several processes may work on one folder: each takes
    what no other has, and all end with the same report. A cell whose plan exceeds this machine's memory fails before
    anything is loaded; `force` runs it all the same. Raises `UserError` for what is wrong beforehand.
    """
    began = time.time()
    check_installed()
    folder = Path(folder)
    place = find_base(experiment.base)
    data = read_data(experiment.cells()[0])
    _refuse_equal_sizes(experiment, len(data.train))
    sized, matched = match(experiment, place, data)
    targets = _check_methods(sized, place, data)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    watch = _warning(watch)
    with CellProcesses(folder, force=force) as processes:
        searches, chosen = _search(sized, Where(place, data), processes, watch, began)
        lanes = [Single(cell) for cell in chosen.cells(place.id, place.revision, data.revision)]
        cells = [lane.cell for lane in lanes]
        resolved = _resolved(experiment, cells, place, data, targets)
        resolved["resolved"]["matched"] = [{**asdict(one), "ratio": one.ratio} for one in matched]
        resolved["resolved"]["cells"] = [cell.place for cell in cells]
        text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True, width=120)
        write_text(folder / "experiment.yaml", text)
        share(lanes, processes, watch, began)
    finished = [(folder / lane.cell.place, lane.result) for lane in lanes if isinstance(lane.result, CellResult)]
    failed = [lane.result for lane in lanes if isinstance(lane.result, FailedCell)]
    return write_results(folder, resolved, finished, [*failed, *_unsearched(experiment, searches)], searches)


def _refuse_equal_sizes(experiment: Experiment, examples: int) -> None:
    """Raises `UserError` where several sizes are all of the training examples: the same run would count twice."""
    whole = [str(size) for size in experiment.data.sizes if size is not None and size >= examples]
    if len(whole) > 1:
        raise UserError(
            f"of the sizes in data.train, {' and '.join(whole)} are the same: there are {examples} training examples",
            f"leave out all but {whole[-1]}",
        )


def _warning(watch: Watcher) -> Watcher:
    """The watcher, with a warning for each method that runs without a plan: what its process says is in its log."""
    said: set[tuple[str, str]] = set()

    def note(cell: Cell, news: News) -> None:
        if isinstance(news, Unplanned) and (what := (cell.method.label, news.reason)) not in said:
            said.add(what)
            log.warning("%s: no plan could be made: %s", *what)
        watch(cell, news)

    return note


def _search(
    experiment: Experiment, where: Where, processes: CellProcesses, watch: Watcher, began: float
) -> tuple[list[Search], Experiment]:
    """Runs the searches that the experiment asks for; gives them, and the experiment with what they chose."""
    if experiment.tuning is None:
        return [], experiment
    lanes = [SearchLane(experiment, choice, where) for choice in experiment.methods]

    def note(cell: Cell, news: News) -> None:
        watch(cell, news)
        if isinstance(news, Trained | FailedCell):
            write_searches(processes.folder, [lane.search for lane in lanes])

    share(lanes, processes, note, began)
    searches = [lane.search for lane in lanes]
    write_searches(processes.folder, searches)
    found = tuple(choice for lane in lanes if (choice := lane.chosen()))
    return searches, experiment.model_copy(update={"methods": found})


def _unsearched(experiment: Experiment, searches: Sequence[Search]) -> list[FailedCell]:
    """A failure for each run of a method of whose search no trial finished."""
    return [
        FailedCell(
            label=search.label,
            method=search.method,
            options={},
            seed=seed,
            reason=f"no trial of its search finished: {search.trials[0].reason}",
            hint="the trials' folders have their logs; give it another learning rate or space to search",
        )
        for search in searches
        if search.chosen is None
        for seed in experiment.seeds
    ]


def write_results(
    folder: Path,
    resolved: dict[str, Any],
    finished: Sequence[Finished],
    failed: Sequence[FailedCell],
    searches: Sequence[Search] = (),
) -> Comparison:
    """Writes results.csv, with every cell, and the report, of the largest number of training examples.

    Cells come in the order of the experiment's methods: the first of them that finished any is the first everywhere,
    whichever seed it failed with.
    """
    order = [choice["label"] for choice in resolved["methods"]]
    finished = sorted(finished, key=lambda one: order.index(one[1].label))
    most = max((result.train_examples for _, result in finished), default=0)
    largest = {place: result for place, result in finished if result.train_examples == most}
    results = list(largest.values())
    curves = {(result.label, result.seed): list(read_events(place / EVENTS)) for place, result in largest.items()}
    smaller = tuple(result for _, result in finished if result.train_examples < most)
    if mixed := different_code([*results, *smaller]):
        log.warning("%s", mixed)
    with writing(folder):
        write_tables(folder, results, failed, smaller)
        report = write_report(folder, resolved, results, failed, curves, smaller)
    return Comparison(folder, results, list(failed), report, smaller, tuple(searches))


def _check_methods(experiment: Experiment, place: Place, data: TextData | DialogueData) -> dict[str, str]:
    """Attaches every method to the base's outline, so that a wrong target is refused before anything trains.

    What a search may choose is counted on it as well. Gives what each method matched, in words.
    """
    matched = {}
    for choice in experiment.methods:
        try:
            model = attach(outline(place, labels=data.labels, storage=choice.storage), choice.make())
            for name, values in choice.search.items():
                for value in (values.low, values.high) if isinstance(values, Range) else values:
                    count(place, choice.with_settings({name: value}).make(), data.labels)
        except UserError as error:
            raise UserError(f"{choice.label}: {error.message}", error.hint) from error
        matched[choice.label] = "\n".join(map(str, model.attachment.parts))
    return matched


def _resolved(
    experiment: Experiment, cells: list[Cell], place: Place, data: TextData | DialogueData, targets: Mapping[str, str]
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
        "targets": dict(targets),
        "versions": versions(),
        "code": code_mark(),
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
