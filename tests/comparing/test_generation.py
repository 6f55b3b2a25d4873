"""A comparison of language models from end to end: a tiny decoder learns to answer, from a table."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from command import Outcome, deltatune
from deltatune.comparing.cell import run_cell
from deltatune.comparing.experiment import make_experiment
from deltatune.training.saved import open_adapter
from runs import in_this_process
from tiny import save_tiny_language_model

PAIRS = {"good": "bright", "bad": "grey", "warm": "moving", "cold": "dull"}


@dataclass(frozen=True)
class Story:
    """A comparison of a decoder as it is with a trained one."""

    folder: Path
    done: Outcome

    def cell(self, label: str) -> Path:
        [folder] = (self.folder / "cells").glob(f"{label}-seed*")
        return folder


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    place = tmp_path_factory.mktemp("place")
    save_tiny_language_model(place / "base", "llama")
    rows = [
        {"prompt": f"the {thing} is {word}", "completion": f"{answer} {thing}"}
        for thing in ("film", "story", "plot", "cast")
        for word, answer in PAIRS.items()
    ]
    for split, count in (("train", 16), ("validation", 8), ("test", 8)):
        lines = [json.dumps(row) for row in rows[:count]]
        (place / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    experiment = {
        "base": str(place / "base"),
        "data": str(place),
        "methods": [
            "none",
            {"method": "lora", "label": "lora", "learning_rate": 3e-2},
        ],
        "training": {"epochs": 12, "batch_tokens": 64, "evaluations": 1},
        "decoding": {"max_new_tokens": 4},
    }
    (place / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    with in_this_process(report=True):
        done = deltatune("compare", place / "experiment.yaml", "--out", place / "run")
    return Story(place / "run", done)


def result(story: Story, label: str) -> dict:
    return json.loads((story.cell(label) / "result.json").read_text())


def test_training_teaches_to_write_what_is_asked_for(story: Story) -> None:
    assert story.done.code == 0, story.done.err
    before, after = result(story, "none"), result(story, "lora")
    assert before["test"]["rougeL"] < 0.3
    assert after["test"]["rougeL"] > 0.9
    assert after["test"]["loss"] < before["test"]["loss"]
    said = [json.loads(line) for line in (story.cell("lora") / "predictions.jsonl").read_text().splitlines()]
    assert sum(line["prediction"] == line["references"][0] for line in said) >= 7


def test_without_training_nothing_changes_and_training_shows_in_the_loss_on_plain_text(story: Story) -> None:
    untouched, trained = result(story, "none"), result(story, "lora")
    assert (untouched["steps"], untouched["trainable"]) == (0, 0)
    assert untouched["plain_text"][0] == untouched["plain_text"][1]
    assert trained["plain_text"][0] == untouched["plain_text"][0]
    assert trained["plain_text"][1] != trained["plain_text"][0]


def test_tables_and_report_show_the_figures_of_writing(story: Story) -> None:
    with (story.folder / "results.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {"rougeL", "rougeL_low_95", "bleu", "perplexity", "test_loss", "plain_text_loss"} <= set(lines[0])
    report = (story.folder / "report.html").read_text()
    assert "ROUGE-L" in report
    assert "Forgotten" in report
    assert "ROUGE-L" in story.done.out


def test_evaluate_repeats_the_loss_of_the_run(story: Story) -> None:
    scores = json.loads(deltatune("evaluate", story.cell("lora"), "--json").out)
    assert scores["loss"] == result(story, "lora")["test"]["loss"]


def test_new_tokens_of_an_experiment_are_single_and_stay_with_the_adapter(tmp_path: Path) -> None:
    save_tiny_language_model(tmp_path / "base", "llama")
    asked = [f"the {thing} is {word}" for thing in ("film", "story", "plot", "cast") for word in PAIRS]
    (tmp_path / "data.jsonl").write_text(
        "\n".join(json.dumps({"prompt": prompt, "completion": "<call> good"}) for prompt in asked)
    )
    content = {
        "base": str(tmp_path / "base"),
        "data": {"name": str(tmp_path / "data.jsonl"), "task": "generation"},
        "methods": ["lora:rank=4,learning_rate=3e-2"],
        "new_tokens": ["<call>"],
        "training": {"epochs": 20, "batch_tokens": 32, "evaluations": 1},
        "decoding": {"max_new_tokens": 3},
    }
    [cell] = make_experiment(content).cells()
    result = run_cell(cell, tmp_path / "run")
    assert result.test["exact_match"] == 1
    ready = open_adapter(tmp_path / "run")
    assert ready.base.tokenizer.tokenize("<call> good") == ["<call>", "good"]
    [said] = deltatune_lines("predict", tmp_path / "run", "--input", one_line(tmp_path, "the film is cold"))
    assert said["prediction"] == "<call> good"


def one_line(folder: Path, text: str) -> Path:
    (folder / "asked.txt").write_text(text + "\n")
    return folder / "asked.txt"


def deltatune_lines(*words: object) -> list[dict]:
    return [json.loads(line) for line in deltatune(*words).out.splitlines()]
