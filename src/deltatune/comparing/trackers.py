"""Experiment trackers as listeners: TensorBoard, MLflow, trackio and Weights & Biases, each writing files of its own.

They hear the events that every listener hears, in the process that started the run: a cell's time and memory are its
own, and nothing leaves the machine. What they write is under FOLDER/tracking/NAME.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from deltatune.comparing.results import CellResult, Elsewhere, FailedCell, Trained
from deltatune.errors import UserError, unknown
from deltatune.training.events import Evaluated, Event, Started, Step

if TYPE_CHECKING:
    from deltatune.comparing.experiment import Cell

Figures = Mapping[str, float]


class Run(Protocol):
    """One run in a tracker."""

    def log(self, figures: Figures, step: int) -> None:
        """Notes figures at a step."""

    def end(self, figures: Figures) -> None:
        """Notes what came out, and closes the run."""


class _TensorBoard:
    def __init__(self, folder: Path, project: str, name: str, settings: Mapping[str, str]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer, self._step = SummaryWriter(str(folder / name)), 0
        self._writer.add_text("settings", "\n".join(f"- {key}: {value}" for key, value in settings.items()))

    def log(self, figures: Figures, step: int) -> None:
        self._step = step
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def end(self, figures: Figures) -> None:
        self.log(figures, self._step)
        self._writer.close()


class _MLflow:
    def __init__(self, folder: Path, project: str, name: str, settings: Mapping[str, str]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        folder.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(tracking_uri=f"sqlite:///{folder.resolve() / 'mlflow.db'}")
        known = self._client.get_experiment_by_name(project)
        artifacts = (folder.resolve() / "artifacts").as_uri()
        experiment = known.experiment_id if known else self._client.create_experiment(project, artifacts)
        self._run, self._step = self._client.create_run(experiment, run_name=name).info.run_id, 0
        self._client.log_batch(self._run, params=[Param(key, value) for key, value in settings.items()])

    def log(self, figures: Figures, step: int) -> None:
        from mlflow.entities import Metric

        self._step, now = step, round(1000 * time.time())
        self._client.log_batch(self._run, [Metric(name, value, now, step) for name, value in figures.items()])

    def end(self, figures: Figures) -> None:
        self.log(figures, self._step)
        self._client.set_terminated(self._run)


class _Trackio:
    def __init__(self, folder: Path, project: str, name: str, settings: Mapping[str, str]) -> None:
        os.environ["TRACKIO_DIR"] = str(folder.resolve())  # read when it is imported
        import trackio

        self._run, self._step = trackio.init(project=project, name=name, config=dict(settings)), 0

    def log(self, figures: Figures, step: int) -> None:
        self._step = step
        self._run.log(dict(figures), step=step)

    def end(self, figures: Figures) -> None:
        self.log(figures, self._step)
        self._run.finish()


class _WeightsAndBiases:
    def __init__(self, folder: Path, project: str, name: str, settings: Mapping[str, str]) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        quiet = wandb.Settings(silent=True, console="off")
        common = {"project": project, "name": name, "config": dict(settings), "settings": quiet}
        self._run = wandb.init(mode="offline", dir=str(folder), **common)

    def log(self, figures: Figures, step: int) -> None:
        self._run.log(dict(figures), step=step)

    def end(self, figures: Figures) -> None:
        self._run.summary.update(dict(figures))
        self._run.finish()


_TRACKERS: dict[str, tuple[Callable[[Path, str, str, Mapping[str, str]], Run], tuple[str, ...]]] = {
    "tensorboard": (_TensorBoard, ("tensorboard",)),
    "mlflow": (_MLflow, ("mlflow", "sqlalchemy", "alembic")),
    "trackio": (_Trackio, ("trackio",)),
    "wandb": (_WeightsAndBiases, ("wandb",)),
}
"""By name: how a run begins, and the packages that it needs."""


class Trackers:
    """Listens to a comparison or a single run and passes it on to the named trackers. Use it as a context manager.

    Raises UserError for a name that is not known or whose package is not installed.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        for name in names:
            if name not in _TRACKERS:
                raise unknown("tracker", name, _TRACKERS)
            if missing := [package for package in _TRACKERS[name][1] if find_spec(package) is None]:
                needs = f"tracking with {name} needs {' and '.join(missing)}"
                raise UserError(needs, f"pip install 'deltatune[{name}]'")
        self._names, self._folder = tuple(dict.fromkeys(names)), folder / "tracking"
        self._runs: list[Run] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end({})  # of what was interrupted

    def watch(self, cell: "Cell", news: Event | Elsewhere | CellResult | Trained | FailedCell) -> None:
        """Hears what happens in a cell."""
        with redirect_stdout(sys.stderr):  # stdout is for our own data
            match news:
                case Started():
                    self._begin(cell)
                case Step():
                    told = {"loss": news.loss, "learning_rate": news.learning_rate, "grad_norm": news.grad_norm}
                    self._log({f"train/{name}": value for name, value in told.items()}, news.step)
                case Evaluated():
                    self._log({f"{news.split}/{name}": value for name, value in news.figures.items()}, news.step)
                case CellResult():
                    cost = {name: getattr(news, name) for name in _COSTS}
                    test = {f"test/{name}": value for name, value in news.test.items()}
                    self._end(test | {f"cost/{name}": float(value) for name, value in cost.items()})
                case Trained() | FailedCell():
                    self._end({})

    def _begin(self, cell: "Cell") -> None:
        self._end({})
        method, training = cell.method, cell.training.model_dump(mode="json")
        settings = {"base": cell.base, "data": cell.data.name, "method": method.method, "seed": cell.seed}
        settings |= {f"method.{name}": value for name, value in method.options.items()}
        settings |= {f"training.{name}": value for name, value in training.items()}
        words = {name: str(value) for name, value in settings.items()}
        project = self._folder.resolve().parent.name
        self._runs = [_TRACKERS[name][0](self._folder / name, project, cell.id, words) for name in self._names]

    def _log(self, figures: Figures, step: int) -> None:
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        for run in self._runs:
            run.log(finite, step)

    def _end(self, figures: Figures) -> None:
        runs, self._runs = self._runs, []
        with ExitStack() as all_of_them, redirect_stdout(sys.stderr):
            for run in runs:
                all_of_them.callback(run.end, figures)


_COSTS = ("train_seconds", "peak_bytes", "adapter_bytes", "trainable", "tokens_per_second")
