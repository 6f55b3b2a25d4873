"""Joining runs of one experiment that were made on several machines: some seeds or methods here, others there."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from deltatune.comparing.cell import ADAPTER, FAILED, RESULT, SPEC
from deltatune.comparing.compare import Comparison, write_results
from deltatune.comparing.experiment import Cell
from deltatune.comparing.processes import outcome
from deltatune.comparing.results import CellResult, FailedCell
from deltatune.comparing.search import Search, read_searches, write_searches
from deltatune.errors import UserError
from deltatune.files import new_folder, read_json, write_text
from deltatune.models.adapters import ABOUT

log = logging.getLogger("deltatune")

_OWN = ("methods", "seeds", "base", "data", "resolved")
"""What runs of one experiment may have more or less of, or call by other names."""
_ALIKE = {
    "data": ("revision", "labels", "train", "validation", "test"),
    "base": ("id", "revision"),
}
"""What must be the same of what was found."""


@dataclass(frozen=True)
class Run:
    """A run's folder as it stands."""

    folder: Path
    experiment: dict[str, Any]
    searches: tuple[Search, ...]

    @property
    def resolved(self) -> Mapping[str, Any]:
        """What was found when it ran."""
        found: Mapping[str, Any] = self.experiment["resolved"]
        return found


def join(folders: Sequence[Path], out: Path) -> Comparison:
    """Writes the finished cells of several runs of one experiment to the new folder `out`, with their report.

    Runs may differ in their methods and seeds; a cell that several have is taken from the first. Raises `UserError`,
    with nothing written, where their data, base, settings, code or versions differ, where a search chose otherwise, or
    where `out` holds something.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is no empty folder", "name a new one, so that nothing is lost")
    if len(folders) < 2:
        raise UserError("there is nothing to join", "name two run folders or more")
    runs = [_read(folder) for folder in folders]
    for other in runs[1:]:
        _refuse_difference(runs[0], other)
    cells = _cells(runs)
    results = {place: result for place, (_, result) in cells.items() if isinstance(result, CellResult)}
    _refuse_other_bases({cells[place][0] / place: place for place in results})
    _refuse_other_tests({cells[place][0] / place: result for place, result in results.items()})
    experiment, searches = _joined(runs), _searches(runs)
    with new_folder(out) as new:
        for place in results:
            shutil.copytree(cells[place][0] / place, new / place)
        write_text(new / "experiment.yaml", yaml.safe_dump(experiment, sort_keys=False, allow_unicode=True, width=120))
        if searches:
            write_searches(new, searches)
            _copy_trials(runs, new)
        failed = [result for _, result in cells.values() if isinstance(result, FailedCell)]
        finished = [(new / place, result) for place, result in results.items()]
        done = write_results(new, experiment, finished, failed, searches)
    return replace(done, folder=out, report=out / "report.html")


def _read(folder: Path) -> Run:
    path = folder / "experiment.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{folder} is no run: could not read {path}", "give folders that `compare` wrote") from error
    if not (isinstance(content, dict) and isinstance(content.get("resolved"), dict) and "cells" in content["resolved"]):
        raise UserError(f"{path} does not say what was run", "give folders that this version of `compare` wrote")
    return Run(folder, content, read_searches(folder))


def _refuse_difference(first: Run, other: Run) -> None:
    """Raises `UserError` that names the first thing in which the runs are not of one experiment."""
    pairs: list[tuple[str, Any, Any]] = [
        (key, first.experiment.get(key), other.experiment.get(key))
        for key in dict.fromkeys((*first.experiment, *other.experiment))
        if key not in _OWN
    ]
    for part, keys in _ALIKE.items():
        pairs += [(f"{part}.{key}", first.resolved[part].get(key), other.resolved[part].get(key)) for key in keys]
    for key in ("code", "versions", "precision"):
        pairs.append((key, first.resolved.get(key), other.resolved.get(key)))
    theirs = {choice["label"]: choice for choice in other.experiment["methods"]}
    for choice in first.experiment["methods"]:
        pairs.append((f"the method '{choice['label']}'", choice, theirs.get(choice["label"], choice)))
    for what, here, there in pairs:
        if here != there and not (what == "base.id" and _local(first, other)):
            raise UserError(
                f"{first.folder} and {other.folder} are not of one experiment: {what} is {here!r} and {there!r}",
                "join runs of the same data, settings and code; make the odd one again",
            )


def _local(first: Run, other: Run) -> bool:
    """Whether both bases are folders, which may be called otherwise on each machine: their weights tell."""
    return all(Path(run.resolved["base"]["id"]).is_absolute() for run in (first, other))


def _cells(runs: Sequence[Run]) -> dict[str, tuple[Path, CellResult | FailedCell]]:
    """Every cell of the runs by its place, with the folder of the run that it is taken from; finished ones first."""
    found: dict[str, tuple[Path, CellResult | FailedCell]] = {}
    for run in runs:
        for place in run.resolved["cells"]:
            folder = run.folder / place
            if not any((folder / name).is_file() for name in (RESULT, FAILED)):
                log.warning("%s has not run: it is left out", folder)
                continue
            result = outcome(Cell.model_validate(read_json(folder / SPEC)), folder)
            assert isinstance(result, CellResult | FailedCell)
            if place not in found or (isinstance(found[place][1], FailedCell) and isinstance(result, CellResult)):
                found[place] = (run.folder, result)
    order = list(dict.fromkeys(choice["label"] for run in runs for choice in run.experiment["methods"]))
    return dict(sorted(found.items(), key=lambda one: (one[1][1].seed, _place(order, one[1][1].label))))


def _place(order: Sequence[str], label: str) -> int:
    return order.index(label) if label in order else len(order)


def _refuse_other_bases(cells: Mapping[Path, str]) -> None:
    """Raises `UserError` where cells of one storage were trained over other weights."""
    marks: dict[str, tuple[str, Path]] = {}
    for folder in cells:
        base = read_json(folder / ADAPTER / ABOUT)["base"]
        mark, first = marks.setdefault(str(base["storage"]), (base["fingerprint"], folder))
        if mark != base["fingerprint"]:
            raise UserError(f"{first} and {folder} were trained on bases with other weights", "join runs of one base")


def _refuse_other_tests(cells: Mapping[Path, CellResult]) -> None:
    """Raises `UserError` where cells were tested on other examples, or run by other code."""
    first = next(iter(cells.items()), None)
    for folder, result in cells.items():
        assert first is not None
        for what, here, there in (
            ("tested on other examples", first[1].test_digest, result.test_digest),
            ("run by other code", first[1].code, result.code),
        ):
            if here != there:
                raise UserError(f"{first[0]} and {folder} were {what}", "make the odd one again")


def _searches(runs: Sequence[Run]) -> list[Search]:
    """The searches of all runs. Raises `UserError` where two chose otherwise for one method."""
    found: dict[str, tuple[Path, Search]] = {}
    for run in runs:
        for search in run.searches:
            folder, first = found.setdefault(search.label, (run.folder, search))
            chosen = [one.chosen.settings if one.chosen else {} for one in (first, search)]
            if chosen[0] != chosen[1]:
                raise UserError(
                    f"the searches for '{search.label}' in {folder} and {run.folder} chose otherwise: "
                    f"{chosen[0]} and {chosen[1]}",
                    "search on one machine, copy its folder to the others, and go on there with other seeds",
                )
    return [search for _, search in found.values()]


def _copy_trials(runs: Sequence[Run], new: Path) -> None:
    """Copies the finished trials, so that who goes on with the whole need not search again."""
    for run in runs:
        for folder in (run.folder / "trials").glob("*"):
            if (folder / RESULT).is_file() and not (new / "trials" / folder.name).exists():
                shutil.copytree(folder, new / "trials" / folder.name)


def _joined(runs: Sequence[Run]) -> dict[str, Any]:
    """The experiment of the whole, with every machine that took part."""
    methods = {choice["label"]: choice for run in reversed(runs) for choice in run.experiment["methods"]}
    labels = dict.fromkeys(choice["label"] for run in runs for choice in run.experiment["methods"])
    first = runs[0]
    resolved = {
        **first.resolved,
        **{
            key: {name: value for run in reversed(runs) for name, value in run.resolved[key].items()}
            for key in ("learning rates", "targets")
        },
        "machine": {str(run.folder): run.resolved["machine"] for run in runs},
        "cells": list(dict.fromkeys(place for run in runs for place in run.resolved["cells"])),
    }
    return {
        **first.experiment,
        "methods": [methods[label] for label in labels],
        "seeds": sorted({seed for run in runs for seed in run.experiment["seeds"]}),
        "resolved": resolved,
    }
