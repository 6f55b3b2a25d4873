"""Virtual tokens from the command line: they leave room for themselves, begin as a text, and score as they did."""

import json

import pytest

from command import assert_refused, deltatune

METHODS = {
    "prompt": ("prompt", "--set", "init=text", "--set", "text=a good film", "--set", "virtual_tokens=40"),
    "ptuning": ("ptuning", "--set", "encoder=lstm", "--set", "virtual_tokens=40"),
    "prefix": ("prefix", "--set", "projection=true", "--set", "virtual_tokens=40"),
}


@pytest.mark.parametrize("name", METHODS)
def test_tune_saves_what_evaluate_scores_alike(name, base, data, tmp_path):
    settings = ("--epochs", 1, "--training", "batch_tokens=128", "--training", "evaluations=1")
    deltatune("tune", "--base", base, "--data", data, "--method", *METHODS[name], *settings, "--out", tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    about = json.loads((tmp_path / "adapter" / "deltatune.json").read_text())
    assert about["max_length"] == 64 - 40
    if name == "prompt":
        assert len(about["options"]["token_ids"]) == 3
    scores = json.loads(deltatune("evaluate", tmp_path, "--json").out)
    assert (scores["accuracy"], scores["loss"]) == (result["test"]["accuracy"], result["test"]["loss"])
    assert_refused(deltatune("merge", tmp_path, "--out", tmp_path / "merged"), f"{name} cannot be merged", "")


def test_tune_refuses_more_virtual_tokens_than_the_base_has_room_for(base, data, tmp_path):
    words = ("--base", base, "--data", data, "--method", "prefix", "--set", "virtual_tokens=63", "--out", tmp_path)
    assert_refused(deltatune("tune", *words), "63 virtual tokens leave no room", "at most 62 virtual tokens fit")
