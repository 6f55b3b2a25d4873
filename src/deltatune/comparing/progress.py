"""How far a run has come, as told by its events and what came out of it: for live tables and pages."""

import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from deltatune.comparing.quality import named
from deltatune.comparing.results import CellResult, Elsewhere, FailedCell, Trained
from deltatune.training.events import Evaluated, Event, Finished, Started, Step

State = Literal["waiting", "training", "testing", "done", "done elsewhere", "kept", "failed"]

_POINTS = 80


@dataclass
class Progress:
    """One cell or trial, from waiting to its end."""

    label: str
    part: str
    """Which of the label's runs it is: "seed 0", "trial 3"."""
    state: State = "waiting"
    """Kept: it was finished before anyone listened. Done elsewhere: another command did it meanwhile."""
    step: int = 0
    steps: int = 0
    seconds: float = 0.0
    """Of training so far."""
    speed: float = 0.0
    """Training examples a second."""
    quality: str = ""
    """The newest figure in words: of validation, and of the test split in the end."""
    reason: str = ""
    """Why it failed."""
    losses: list[tuple[float, float]] = field(default_factory=list)
    """Epoch and training loss of each step, where that is finite."""
    validation: list[tuple[float, float]] = field(default_factory=list)
    """Epoch and validation loss of each evaluation."""

    def hear(self, news: Event | Elsewhere | CellResult | Trained | FailedCell) -> None:
        """Takes in what happened."""
        match news:
            case Started():
                self.state, self.steps, self.step, self.seconds, self.quality = "training", news.steps, 0, 0.0, ""
                self.losses.clear()
                self.validation.clear()
            case Step():
                self.step, self.seconds, self.speed = news.step, news.seconds, news.examples / (news.seconds or 1)
                if math.isfinite(news.loss):
                    self.losses.append((news.epoch, news.loss))
            case Evaluated():
                if math.isfinite(news.loss):
                    self.validation.append((news.epoch, news.loss))
                self.quality = _validation(news.figures)
            case Finished():
                self.state, self.seconds = "testing", news.seconds
            case Elsewhere():
                self.state = "done elsewhere"
            case CellResult():
                self._end(news.steps, news.train_seconds, f"{named(news.metric).word} {news.quality:.1%}")
            case Trained():
                self._end(news.steps, news.train_seconds, _validation(news.validation))
                self.reason = news.reason
            case FailedCell():
                self.state, self.reason = "failed", news.reason

    def _end(self, steps: int, seconds: float, quality: str) -> None:
        if self.state != "done elsewhere":
            self.state = "kept" if self.state == "waiting" else "done"
        self.step = self.steps = steps
        self.seconds, self.quality = seconds, quality

    @property
    def left(self) -> float | None:
        """Seconds of training that are left at the pace so far; None where that cannot be said."""
        if self.state != "training" or not self.step:
            return None
        return self.seconds / self.step * (self.steps - self.step)

    @property
    def loss(self) -> float | None:
        """The newest training loss."""
        return self.losses[-1][1] if self.losses else None

    def curve(self) -> list[tuple[float, float]]:
        """The training loss in at most 80 points, each the mean of as many steps in a row."""
        size = max(1, math.ceil(len(self.losses) / _POINTS))
        blocks = [self.losses[start : start + size] for start in range(0, len(self.losses), size)]
        return [(fmean(epoch for epoch, _ in block), fmean(loss for _, loss in block)) for block in blocks]


def _validation(figures: dict[str, float]) -> str:
    return f"val {figures['accuracy']:.1%}" if "accuracy" in figures else f"val loss {figures.get('loss', 0):.3f}"
