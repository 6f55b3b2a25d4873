"""`--storage`: a base in fewer bits, from training to an ordinary merged model."""

import json

import pytest
from safetensors.torch import load_file

from command import deltatune
from runs import write_run

FAST = ("--training", "batch_tokens=256", "--training", "evaluations=1", "--epochs", 1)


@pytest.fixture(scope="module")
def tuned(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "qdora"
    words = ("--base", base, "--data", data, "--method", "dora", "--set", "rank=2", "--storage", "nf4:block=16")
    return folder, deltatune("tune", *words, *FAST, "--out", folder, "--json")


def test_the_adapter_says_how_its_base_was_stored_and_is_scored_over_it(tuned, base, data):
    folder, command = tuned
    assert command.code == 0, command.err
    record = json.loads((folder / "adapter" / "deltatune.json").read_text())
    assert record["base"]["storage"] == {"all-linear": "nf4:block=16,double=true"}
    scored = deltatune("evaluate", folder, "--json")
    assert scored.code == 0, scored.err
    assert json.loads(scored.out)["accuracy"] == pytest.approx(json.loads(command.out)["accuracy"], abs=1e-4)


def test_the_merged_model_is_an_ordinary_one(tuned, base, tmp_path):
    folder, _ = tuned
    merged = deltatune("merge", folder, "--out", tmp_path / "merged")
    assert merged.code == 0, merged.err
    plain, ours = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert {name for name in plain if name.startswith("bert.")} <= ours.keys()
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--storage", "nf5"), "no storage named 'nf5'"),
        (("--storage", "nf4:block=0"), "block must be a power of two"),
        (("--storage", "{qurey: nf4}"), "target 'qurey' matches no layer"),
        (("--storage", "nf4", "--method", "full"), "full trains bert"),
    ],
)
def test_what_cannot_be_stored_so_is_refused(words, message, base, data, tmp_path):
    refused = deltatune("tune", "--base", base, "--data", data, *words, "--out", tmp_path / "out")
    assert refused.code == 1
    assert message in refused.err
    assert "hint:" in refused.err


def test_a_comparison_refuses_a_method_that_trains_stored_weights_before_anything_runs(tmp_path):
    run = write_run(tmp_path, methods=["lora", {"method": "full", "storage": "nf4"}])
    refused = run.start()
    assert refused.code == 1
    assert "full (storage=nf4): full trains bert" in refused.err
    assert not (run.folder / "cells").exists()
