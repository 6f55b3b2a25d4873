"""A base that is damaged or lacks a part is refused by name before any cell runs."""

import json
import shutil

import pytest

from command import assert_refused, deltatune
from deltatune.comparing import compare


def cut_off(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def without_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def impossible(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5}))


DAMAGED = {
    "weights that were cut off": (cut_off, "model.safetensors"),
    "no tokenizer": (without_tokenizer, "no tokenizer"),
    "a configuration that cannot be": (impossible, "not a multiple"),
}


@pytest.mark.parametrize(("spoil", "error"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_base_is_refused_before_any_cell_runs(base, data, tmp_path, monkeypatch, spoil, error):
    monkeypatch.setattr(compare.CellProcesses, "run", lambda processes, cell: pytest.fail("a cell ran"))
    spoil(shutil.copytree(base, tmp_path / "base"))
    done = deltatune(
        "compare", "--base", tmp_path / "base", "--data", data, "--method", "head", "--out", tmp_path / "run"
    )
    assert_refused(done, error)


@pytest.mark.parametrize(
    "words", ["--epochs inf", "--precision fp8", "--method lora:rank=x", "--method lora:targets=["]
)
def test_values_that_cannot_be_are_refused_with_a_hint(base, data, tmp_path, words):
    done = deltatune("compare", "--base", base, "--data", data, *words.split(), "--out", tmp_path / "run")
    assert_refused(done)
    assert "literal[" not in done.err
