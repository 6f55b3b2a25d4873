"""`deltatune merge`: a saved adapter and its base become one model that Transformers loads alone."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import deltatune as library
from command import assert_refused, deltatune
from conformance.cases import bits, shaken
from deltatune.files import read_json
from deltatune.training.saved import open_adapter
from tiny import save_tiny

TEXTS = ["a good film", "정말 지루하다 and the cast is not great"]


def logits(model, tokenizer):
    with torch.no_grad():
        return model.eval()(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits


@pytest.fixture(scope="module")
def merged(tuned, tmp_path_factory):
    """The folder of a merged model, and what the command said."""
    out = tmp_path_factory.mktemp("merged") / "model"
    return out, deltatune("merge", tuned.folder, "--out", out, "--json")


def test_the_merged_model_loads_with_transformers_alone_and_gives_the_adapted_logits(tuned, merged):
    folder, done = merged
    assert (done.code, done.err) == (0, "")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    adapted = open_adapter(tuned.folder, precision="fp32").base
    assert not any("deltas" in name for name in model.state_dict())
    torch.testing.assert_close(logits(model, tokenizer), logits(adapted.model, adapted.tokenizer), atol=1e-5, rtol=1e-5)
    labels = read_json(tuned.folder / "adapter" / "deltatune.json")["labels"]
    assert [model.config.id2label[number] for number in range(len(labels))] == labels
    assert model.config.label2id == {label: number for number, label in enumerate(labels)}
    assert model.dtype == torch.float32
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir()), "others may read it"


def test_what_was_merged_and_how_far_it_is_off_is_said_on_stdout(tuned, merged, tmp_path):
    folder, done = merged
    said = json.loads(done.out)
    assert (said["method"], said["layers"], said["out"]) == ("lora", 13, str(folder))
    assert 0 <= said["largest_difference"] < 1e-4 * said["largest_output"]
    shown = deltatune("merge", tuned.folder, "--out", tmp_path / "model")
    assert shown.code == 0
    assert all(word in shown.out for word in ("lora", "13", "largest_difference"))


def test_the_merged_model_is_a_base_to_train_on(merged, data, tmp_path):
    folder, _ = merged
    words = ("--base", folder, "--data", data, "--method", "lora", "--epochs", 1, "--training", "batch_tokens=128")
    assert deltatune("tune", *words, "--out", tmp_path / "tuned").code == 0


def test_a_difference_above_the_tolerance_is_an_error_and_nothing_is_written(tuned, tmp_path):
    out = tmp_path / "model"
    done = deltatune("merge", tuned.folder, "--out", out, "--tolerance", -1)
    assert done.code == 1
    assert "error: merging changes an output by" in done.err
    assert "hint: keep the adapter beside its base" in done.err
    assert (done.out, list(tmp_path.iterdir())) == ("", [])


def test_what_cannot_be_merged_is_an_error_and_nothing_is_written(tmp_path):
    place = save_tiny(tmp_path / "base", "t5")
    base = library.load(str(place), labels=("no", "yes"))
    model = shaken(library.attach(base.model, library.LoRA(rank=2, targets="embeddings")))
    library.save_adapter(model, tmp_path / "adapter", base=base.id, revision=base.revision, labels=["no", "yes"])
    assert_refused(
        deltatune("merge", tmp_path / "adapter", "--out", tmp_path / "model"),
        "tied to transformer.shared",
        "keep the adapter",
    )
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_nothing_that_stands_there_is_overwritten(tuned, base, tmp_path):
    before = {path: path.read_bytes() for path in base.iterdir()}
    assert_refused(deltatune("merge", tuned.folder, "--out", base), "exists and is no empty folder", "a new one")
    assert {path: path.read_bytes() for path in base.iterdir()} == before
    (tmp_path / "empty").mkdir()
    assert deltatune("merge", tuned.folder, "--out", tmp_path / "empty").code == 0


def test_an_adapter_of_a_base_that_moved_is_merged_into_it_there(tuned, base, merged, tmp_path):
    (tmp_path / "moved").symlink_to(base)
    done = deltatune("merge", tuned.folder, "--out", tmp_path / "model", "--base", tmp_path / "moved", "--json")
    assert done.code == 0
    weights = "model.safetensors"
    assert (tmp_path / "model" / weights).read_bytes() == (merged[0] / weights).read_bytes()


@pytest.mark.parametrize("method", ["full", "head"])
def test_what_trained_the_base_s_own_parameters_becomes_a_model_as_well(method, base, data, tmp_path):
    words = ("--base", base, "--data", data, "--method", method, "--epochs", 1, "--training", "batch_tokens=128")
    assert deltatune("tune", *words, "--out", tmp_path / "tuned").code == 0
    done = deltatune("merge", tmp_path / "tuned", "--out", tmp_path / "model", "--json")
    assert (json.loads(done.out)["layers"], json.loads(done.out)["largest_difference"]) == (0, 0.0)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    adapted = open_adapter(tmp_path / "tuned", precision="fp32").base
    assert bits(model).keys() == bits(adapted.model).keys()
    assert all(torch.equal(value, adapted.model.state_dict()[name]) for name, value in model.state_dict().items())
