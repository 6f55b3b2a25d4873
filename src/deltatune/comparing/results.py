"""What a comparison found: one result for each cell, as it stands in the cell's result.json."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class CellResult(BaseModel):
    """A finished cell: one method with one seed, trained and tested in a process of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    label: str
    """How tables and plots call the method of this cell; the same for all its seeds."""
    method: str
    options: dict[str, Any]
    """Every hyperparameter of the method, defaults written out."""
    seed: int

    accuracy: float
    """On the test split, in [0, 1]."""
    macro_f1: float
    test_loss: float
    validation_accuracy: float
    validation_loss: float
    train_loss: float
    """Mean over the last tenth of the steps, dropout on."""
    test_labels: list[int]
    predictions: list[int]
    """Predicted label of each test example, in the order of `test_labels`: what paired intervals are made from."""

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
    trainable: int
    total: int
    adapter_bytes: int
    """Size on disk of what was saved."""
    model_bytes: int
    """Bytes of the adapted model's parameters and buffers in memory."""
    precision: str


class FailedCell(BaseModel):
    """A cell that did not finish, and why, in words for the user."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str
    method: str
    options: dict[str, Any]
    seed: int
    reason: str
    hint: str = ""
