"""The experiments for machines with a hub and a GPU, run dry: their methods on tiny models of the same architecture.

The data has the columns of the hub's and a few rows that words of the tiny tokenizer can be read in.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from deltatune.comparing.cell import run_cell
from deltatune.comparing.compare import _check_methods
from deltatune.comparing.experiment import read_experiment
from deltatune.data import load_data
from deltatune.models.places import find_base
from tiny import save_tiny, save_tiny_language_model

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@dataclass(frozen=True)
class Dry:
    """What stands in for the base and the data of an experiment."""

    architecture: str
    row: dict[str, Any]
    """One row; in its texts # is a number, and so its label is one of two."""
    most: int
    """How many of its methods run: larger ranks do not fit the tiny model."""
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "sst2-gpt2-large": Dry("gpt2", {"idx": 0, "sentence": "the film is good #", "label": "#"}, 4),
    "nsmc-klue-bert": Dry("bert", {"id": "0", "document": "영화 정말 좋다 #", "label": "#"}, 2),
    "dialogsum-flan-t5": Dry(
        "t5",
        {"id": "0", "dialogue": "the story is # good", "summary": "it is # good", "topic": "film"},
        3,
        {"feed_forward_proj": "gated-gelu"},
    ),
    "e2e-gpt2-medium": Dry(
        "gpt2", {"meaning_representation": "film # and plot", "human_reference": "the film is # good"}, 3
    ),
}


def filled(value: Any, number: int) -> Any:
    if value == "#":
        return number % 2
    return value.replace("#", "very " * (number % 3)) if isinstance(value, str) else value


@pytest.mark.parametrize("name", CASES)
def test_it_runs_on_a_tiny_model_of_its_architecture(name: str, tmp_path: Path) -> None:
    dry = CASES[name]
    save = save_tiny if "label" in dry.row else save_tiny_language_model
    save(tmp_path / "base", dry.architecture, **dry.options)
    (tmp_path / "data").mkdir()
    for split, count in (("train", 12), ("validation", 6), ("test", 6)):
        rows = [{key: filled(value, number) for key, value in dry.row.items()} for number in range(count)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "base": str(tmp_path / "base"),
        "data": {"name": str(tmp_path / "data"), "train": None},
        "training": {"epochs": 1, "max_length": 48},
        "decoding": {"max_new_tokens": 4},
    }
    experiment = read_experiment(EXPERIMENTS / f"{name}.yaml", changes)
    experiment = experiment.model_copy(update={"methods": experiment.methods[: dry.most], "seeds": (0,)})
    data = load_data(**experiment.data.model_dump(include={"name", "task", "text", "label", "template", "system"}))
    assert all(_check_methods(experiment, find_base(experiment.base), data).values())
    for cell in experiment.cells():
        result = run_cell(cell, tmp_path / cell.id)
        assert result.metric == ("accuracy" if "label" in dry.row else "rougeL")
        assert result.steps >= (cell.method.method != "none")
