"""The search for each method's settings: what was tried, what it gave on validation, what was chosen, what it cost.

RUN/searches.json has one `Search` for each method, in the order of the experiment, written anew after every trial.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from deltatune.errors import UserError
from deltatune.files import read_json, write_text

SEARCHES = "searches.json"

_STRICT = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

Setting = bool | int | float | str
"""The value of one thing that is searched for."""


class Range(BaseModel):
    """Every number between two, ends included."""

    model_config = _STRICT

    low: float
    high: float
    log: bool = False
    """Whether it is searched by orders of magnitude, as learning rates are."""


Values = Annotated[tuple[Setting, ...], Field(min_length=1)]
"""The values to choose from."""

Space = dict[str, Range | Values]
"""What may be set, by name: `learning_rate`, and hyperparameters of the method such as `rank`."""


class Trial(BaseModel):
    """One run of a method with one choice of settings, scored on the validation split alone."""

    model_config = _STRICT

    number: int
    """From 0, which has the settings that the experiment would take without a search."""
    settings: dict[str, Setting]
    status: Literal["done", "failed"]
    value: float | None = None
    """The metric on validation of the weights that were kept, larger being better; None unless it is done."""
    validation: dict[str, float] = {}
    """Every figure on the validation split."""
    steps: int = 0
    """Optimiser steps that were made."""
    best_step: int = 0
    """The step whose weights were kept."""
    train_seconds: float = 0.0
    """Optimiser steps alone."""
    seconds: float = 0.0
    """All of its process's time: loading, training, evaluating."""
    cell: str = ""
    """Its folder below RUN/trials."""
    reason: str = ""
    """Why it failed."""


class Search(BaseModel):
    """The search for the settings of one method."""

    model_config = _STRICT

    label: str
    method: str
    metric: str = ""
    """What trials were ranked by, of the validation split; "loss" stands for its negative."""
    space: Space
    budget: int
    """Trials: the same for every method that trains at all."""
    seed: int
    """The seed of every trial, none of the experiment's."""
    trials: tuple[Trial, ...] = ()

    @property
    def done(self) -> bool:
        """Whether the budget is spent."""
        return len(self.trials) >= self.budget

    @property
    def chosen(self) -> Trial | None:
        """The trial with the best value, of equals that with the least loss; None where none finished."""
        finished = [(trial.value, -trial.validation["loss"], trial) for trial in self.trials if trial.value is not None]
        return max(finished, key=lambda one: one[:2], default=(0.0, 0.0, None))[2]

    @property
    def steps(self) -> int:
        """Optimiser steps of all trials together."""
        return sum(trial.steps for trial in self.trials)

    @property
    def train_seconds(self) -> float:
        """Seconds of optimiser steps of all trials together."""
        return sum(trial.train_seconds for trial in self.trials)

    @property
    def seconds(self) -> float:
        """Seconds of all trials together: what the search cost."""
        return sum(trial.seconds for trial in self.trials)


_SEARCHES = TypeAdapter(tuple[Search, ...])


def write_searches(folder: Path, searches: Sequence[Search]) -> None:
    """Writes RUN/searches.json."""
    text = _SEARCHES.dump_json(tuple(searches), indent=2).decode()
    write_text(folder / SEARCHES, text + "\n")


def read_searches(folder: Path) -> tuple[Search, ...]:
    """The searches of a run, () where it has none. Raises UserError for a damaged file."""
    path = folder / SEARCHES
    if not path.is_file():
        return ()
    try:
        return _SEARCHES.validate_python(read_json(path))
    except ValidationError as error:
        raise UserError(f"{path} holds no searches", "it is damaged or was written by another version") from error
