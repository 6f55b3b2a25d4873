"""Following a run from outside, by what stands in its folder: no process of the run is asked, and none waits."""

from pathlib import Path
from typing import Any

import yaml

from deltatune.comparing.locks import is_running
from deltatune.comparing.progress import Progress
from deltatune.comparing.results import FailedCell, read_result
from deltatune.errors import UserError
from deltatune.files import read_json
from deltatune.training.events import parse_event

_FILES = ("report.html", "results.csv", "results.parquet", "results.md")


class _Followed:
    """One cell's folder: what was read of it, and what has been added since."""

    def __init__(self, folder: Path) -> None:
        spec = read_json(folder / "spec.json")
        part = f"trial {spec['trial']}" if "trial" in spec else f"seed {spec['seed']}"
        self.folder, self.progress = folder, Progress(spec["method"]["label"], part)
        self._read, self._ended = 0, 0

    def look(self) -> Progress:
        """Reads what is new."""
        events = self.folder / "events.jsonl"
        if events.is_file():
            self._hear(events)
        for name in ("result.json", "failed.json"):
            path = self.folder / name
            if path.is_file() and path.stat().st_mtime_ns != self._ended:
                self._ended = path.stat().st_mtime_ns
                self._end(path)
        return self.progress

    def _hear(self, events: Path) -> None:
        if events.stat().st_size < self._read:  # it was started anew
            self._read = 0
        with events.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]  # the last line may be half written
        self._read += len(whole)
        for line in whole.decode("utf-8", errors="replace").splitlines():
            if line.startswith("{"):
                self.progress.hear(parse_event(line))

    def _end(self, path: Path) -> None:
        result = read_result(path) if path.name == "result.json" else None
        if result:
            self.progress.hear(result)
        elif path.name == "failed.json":
            label, method = self.progress.label, ""
            self.progress.hear(FailedCell(label=label, method=method, options={}, seed=0, **read_json(path)))


class Follower:
    """A run's folder, of `compare` or of `tune`, looked at again and again."""

    def __init__(self, folder: Path) -> None:
        if not any((folder / name).exists() for name in ("cells", "trials", "spec.json")):
            raise UserError(f"{folder} is no run", "give the folder that `compare` or `tune` writes to with --out")
        self.folder = folder
        self._cells: dict[Path, _Followed] = {}

    def snapshot(self) -> dict[str, Any]:
        """What is known now, as JSON: cells with their curves, how many still wait, and the files that are there."""
        cells = [self._snapshot(path) for path in self._folders()]
        planned = self._planned()
        begun = sum(not cell["trial"] for cell in cells)
        over = begun >= planned and all(cell["state"] in ("done", "failed") for cell in cells)
        return {
            "title": self.folder.resolve().name,
            "cells": cells,
            "waiting": max(0, planned - begun),
            "files": [name for name in _FILES if (self.folder / name).is_file()],
            "over": over,
        }

    def _folders(self) -> list[Path]:
        own = [self.folder] if (self.folder / "spec.json").is_file() else []
        found = [path.parent for part in ("trials", "cells") for path in (self.folder / part).glob("*/spec.json")]
        return own + sorted(found, key=lambda path: (path / "spec.json").stat().st_mtime_ns)

    def _snapshot(self, folder: Path) -> dict[str, Any]:
        if folder not in self._cells:
            self._cells[folder] = _Followed(folder)
        progress = self._cells[folder].look()
        state: str = "done" if progress.state == "kept" else progress.state
        if state in ("waiting", "training", "testing") and folder != self.folder and not is_running(folder):
            state = "stopped"
        return {
            "id": folder.name,
            "label": progress.label,
            "part": progress.part,
            "trial": progress.part.startswith("trial"),
            "state": "loading" if state == "waiting" else state,
            "step": progress.step,
            "steps": progress.steps,
            "loss": progress.loss,
            "quality": progress.quality,
            "seconds": progress.seconds,
            "left": progress.left,
            "reason": progress.reason,
            "curve": progress.curve(),
            "validation": progress.validation,
        }

    def _planned(self) -> int:
        """The cells that the run will have; 0 where it does not say so yet."""
        path = self.folder / "experiment.yaml"
        if not path.is_file():
            return 0
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        train = content["data"].get("train")
        return len(content["methods"]) * len(content["seeds"]) * (len(train) if isinstance(train, list) else 1)
