"""What a comparison found: one result for each cell, as it stands in the cell's result.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from deltatune.errors import UserError
from deltatune.files import read_json


class Latency(BaseModel):
    """Seconds that one forward pass takes on one test example of middling length, medians of interleaved rounds.

    A method that trains the base's own weights computes as the base does: its figures are one measurement.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    tokens: int
    """Of the example."""
    rounds: int
    """How often each was timed, in turn with the others."""
    base: float
    """The base, with the adapter switched off."""
    adapted: float
    """The adapter beside the base's weights."""
    merged: float | None
    """The adapter merged into them; None where the method cannot be merged."""


class Trained(BaseModel):
    """A trial of a search that ran to its end: trained and scored on validation. Nothing of the test split is in it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    label: str
    number: int
    """Of the trial."""
    metric: str
    value: float | None
    """The metric on validation of the weights that were kept, larger being better: a loss counts negative. None where
    training diverged."""
    validation: dict[str, float]
    steps: int
    best_step: int
    train_seconds: float
    seconds: float
    """From before the data was read until all was done."""
    reason: str = ""
    """Why it has no value."""


class CellResult(BaseModel):
    """A finished cell: one method with one seed, trained and tested in a process of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    label: str
    """How tables and plots call the method of this cell; the same for all its seeds."""
    method: str
    options: dict[str, Any]
    """Every hyperparameter of the method, defaults written out."""
    seed: int

    metric: str
    """Which of the test figures methods are compared by, such as accuracy; larger is better."""
    test: dict[str, float]
    """Every figure on the test split by name, the metric and `loss` among them."""
    variants: dict[str, str] = {}
    """Of the figures that come in several variants, which one was computed."""
    test_values: list[float]
    """The metric of each test example, in [0, 1]: what paired intervals are made from."""
    test_digest: str
    """SHA-256 of the test examples: cells are compared on the same ones alone."""
    validation: dict[str, float]
    """The figures on the validation split of the weights that were kept."""
    train_loss: float
    """Mean over the last tenth of the steps, dropout on; 0 where nothing trained."""
    plain_text: tuple[float, float] | None = None
    """Loss of a language model on a fixed text that is not the task, before and after: what it forgot."""
    drift: float | None = None
    """How far a classifier's states of that fixed text moved in training: the mean over its tokens of 1 minus the
    cosine of the last hidden state before and after. Its base has no task of its own left to be scored on: this is no
    measure of what it lost, but where it is near 0 nothing can have been lost. None for a language model."""

    train_examples: int = 0
    """Examples that it was trained on: a comparison may have several such sizes."""
    truncated: int
    """Training examples that were longer than the limit and lost a part."""
    steps: int
    train_seconds: float
    """Optimiser steps alone: no loading, no evaluation."""
    examples_per_second: float
    tokens_per_second: float
    """Real tokens, padding not counted."""

    peak_bytes: int
    """Largest resident memory of the cell's process."""
    baseline_bytes: int
    """Resident memory of that process with its libraries imported, before the base was loaded."""
    training_peak_bytes: int = 0
    """The same until the training ended: what a plan speaks of."""
    planned_peak_bytes: int | None = None
    """What that was planned to be; None where no plan was made."""
    planned_seconds: float | None = None
    """What `train_seconds` was planned to be."""
    trainable: int
    total: int
    adapter_bytes: int
    """Size on disk of what was saved, its model card not counted."""
    model_bytes: int
    """Bytes of the adapted model's parameters and buffers in memory."""
    precision: str
    latency: Latency | None = None
    """None in runs of older versions."""
    code: str = ""
    """A mark of the code that ran it; see provenance.py."""

    @property
    def quality(self) -> float:
        """The metric over the whole test split."""
        return self.test[self.metric]


class FailedCell(BaseModel):
    """A cell that did not finish, and why, in words for the user."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str
    method: str
    options: dict[str, Any]
    seed: int
    reason: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Another command ran the cell since this one began; what came out of it follows."""


_RESULT: TypeAdapter[CellResult | Trained] = TypeAdapter(CellResult | Trained)


def read_result(path: Path) -> CellResult | Trained | None:
    """What stands in a result.json; None where it is missing, damaged, or from a version with other fields."""
    if not path.is_file():
        return None
    try:
        return _RESULT.validate_python(read_json(path))
    except (UserError, ValueError):
        return None
