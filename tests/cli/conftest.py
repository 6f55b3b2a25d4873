"""A tiny base, data for it and an adapter that `deltatune tune` made of them."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from command import Outcome, deltatune, write_reviews
from tiny import save_tiny


@dataclass(frozen=True)
class Tuned:
    """An adapter's folder and what the command said."""

    folder: Path
    command: Outcome


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"), "bert")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_reviews(tmp_path_factory.mktemp("data") / "reviews.csv")


@pytest.fixture(scope="session")
def tuned(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    settings = ("--training", "batch_tokens=128", "--training", "evaluations=1")
    words = ("--base", base, "--data", data, "--method", "lora", "--set", "rank=4", "--epochs", 2, *settings)
    return Tuned(folder, deltatune("tune", *words, "--out", folder, "--json"))
