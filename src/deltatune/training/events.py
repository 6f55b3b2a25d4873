"""What happens in a run, as typed events: the loop emits them; progress bars, files and reports listen.

On disk an event is one line of JSON, so that a half-written last line harms nothing before it.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import get_args

from deltatune.errors import UserError


@dataclass(frozen=True, slots=True)
class Started:
    """A run begins."""

    steps: int
    """Optimiser steps that are planned."""
    epochs: float
    examples: int
    """Training examples in one epoch."""
    trainable: int
    """Parameters that get gradients."""
    total: int
    """Parameters of the adapted model."""
    precision: str
    seed: int


@dataclass(frozen=True, slots=True)
class Planned:
    """What the run was planned to take, before anything was loaded."""

    peak_bytes: int
    """The most bytes that the process would hold while it loads, trains and validates."""
    seconds: float
    """Of all steps together."""
    machine: str
    """What the plan knew of the machine."""


@dataclass(frozen=True, slots=True)
class Unplanned:
    """No plan could be made of the run, which goes on without."""

    reason: str


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step is done."""

    step: int
    epoch: float
    loss: float
    """Mean training loss over the examples, or scored tokens, of this step, dropout on."""
    learning_rate: float
    grad_norm: float
    """Norm of all gradients before clipping."""
    examples: int
    """Examples seen so far in this run."""
    tokens: int
    """Real (unpadded) tokens seen so far in this run."""
    seconds: float
    """Training time so far, evaluation not counted."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The model was scored on a split."""

    step: int
    epoch: float
    split: str
    figures: dict[str, float]
    """What came out, by name: the loss, and what else the task has."""
    examples: int
    seconds: float
    """How long the scoring took."""

    @property
    def loss(self) -> float:
        """Mean cross-entropy, in nats."""
        return self.figures["loss"]


@dataclass(frozen=True, slots=True)
class Finished:
    """A run ends."""

    steps: int
    seconds: float
    """Training time, evaluation not counted."""
    best_step: int
    """The step whose weights were kept."""


Event = Planned | Unplanned | Started | Step | Evaluated | Finished
Listener = Callable[[Event], None]

_KINDS: dict[str, type[Event]] = {kind.__name__.lower(): kind for kind in get_args(Event)}


class EventFile:
    """A listener that appends each event to a JSONL file as it happens. Use it as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> "EventFile":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w", encoding="utf-8")
        return self

    def __call__(self, event: Event) -> None:
        """Appends the event, so that it is in the file when this returns."""
        line = json.dumps({"event": type(event).__name__.lower(), **asdict(event)})
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"could not write {self.path}: {error.strerror}", "free some space, then run again"
            ) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # what could not be written was said when it was tried
            self._file.close()


def read_events(path: Path) -> Iterator[Event]:
    """The events of a file in order; a last line that was cut off by a crash is left out."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            yield parse_event(line)


def parse_event(line: str) -> Event:
    """The event that a line of an event file holds."""
    fields = json.loads(line)
    return _KINDS[fields.pop("event")](**fields)
