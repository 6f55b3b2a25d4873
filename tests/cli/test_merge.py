"""`deltatune merge`: a saved adapter and its base become one model that Transformers loads alone."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import deltatune as library
from command import assert_refused, deltatune, write_reviews
from conformance.cases import bits, shaken
from deltatune.data.tokens import tokenize
from deltatune.files import read_json
from deltatune.models.adapted import quantised_layers
from deltatune.models.quantise import storages_of
from deltatune.training.saved import open_adapter
from deltatune.training.tasks import task_for
from tiny import save_tiny

NF4 = "nf4:block=16"
TEXTS = ["a good film", "정말 지루하다 and the cast is not great"]


def logits(model, tokenizer):
    with torch.no_grad():
        return model.eval()(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits


@pytest.fixture(scope="module")
def merged(tuned, tmp_path_factory):
    """The folder of a merged model, and what the command said."""
    out = tmp_path_factory.mktemp("merged") / "model"
    return out, deltatune("merge", tuned.folder, "--out", out, "--json")


@pytest.fixture(scope="module")
def exact(tuned, tmp_path_factory):
    """The same in fp32."""
    out = tmp_path_factory.mktemp("exact") / "model"
    return out, deltatune("merge", tuned.folder, "--out", out, "--storage", "fp32", "--json")


@pytest.mark.parametrize(
    ("made", "dtype", "tolerance"), [("merged", torch.bfloat16, 0.03), ("exact", torch.float32, 1e-5)]
)
def test_the_merged_model_loads_with_transformers_alone_and_gives_the_adapted_logits(
    tuned, request, made, dtype, tolerance
):
    folder, done = request.getfixturevalue(made)
    assert (done.code, done.err) == (0, "")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    adapted = open_adapter(tuned.folder, precision="fp32").base
    assert not any("deltas" in name for name in model.state_dict())
    theirs = logits(adapted.model, adapted.tokenizer)
    off = (logits(model.float(), tokenizer) - theirs).abs().max()
    assert off <= tolerance * theirs.abs().max()
    assert (off > 1e-5) == (dtype == torch.bfloat16), "what was rounded differs"
    labels = read_json(tuned.folder / "adapter" / "deltatune.json")["labels"]
    assert [model.config.id2label[number] for number in range(len(labels))] == labels
    assert model.config.label2id == {label: number for number, label in enumerate(labels)}
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir()), "others may read it"


def test_what_was_merged_and_how_far_it_is_off_is_said_on_stdout(tuned, merged, exact, tmp_path):
    said, precise = json.loads(merged[1].out), json.loads(exact[1].out)
    assert (said["method"], said["layers"], said["storage"], said["out"]) == ("lora", 13, "bf16", str(merged[0]))
    assert precise["storage"] == "fp32"
    assert 0 <= precise["mean_difference"] <= precise["largest_difference"] < 1e-4 * precise["largest_output"]
    assert precise["largest_difference"] < said["mean_difference"] < said["largest_difference"]
    shown = deltatune("merge", tuned.folder, "--out", tmp_path / "model")
    assert shown.code == 0
    assert all(word in shown.out for word in ("lora", "13", "largest_difference"))


@pytest.fixture(scope="module")
def qlora(base, data, tmp_path_factory):
    """An adapter over a base in four bits, trained in fp32 so that it is the same on every processor."""
    folder = tmp_path_factory.mktemp("qlora") / "tuned"
    words = ("--base", base, "--data", data, "--storage", NF4, "--set", "rank=4", "--epochs", 2)
    more = ("--training", "batch_tokens=128", "--precision", "fp32")
    assert deltatune("tune", *words, *more, "--out", folder).code == 0
    return folder


def test_an_adapter_over_four_bits_is_merged_into_what_they_decode_to(qlora, tmp_path):
    done = deltatune("merge", qlora, "--out", tmp_path / "model", "--storage", "fp32", "--json")
    assert json.loads(done.out)["largest_difference"] < 1e-4 * json.loads(done.out)["largest_output"]
    assert "loss_before" not in json.loads(done.out)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    adapted = open_adapter(qlora, precision="fp32").base
    torch.testing.assert_close(logits(model, adapted.tokenizer), logits(adapted.model, adapted.tokenizer))


@pytest.fixture(scope="module")
def requantised(qlora, tmp_path_factory):
    """The folder of a merged model in four bits again, and what the command said."""
    out = tmp_path_factory.mktemp("requantised") / "model"
    return out, deltatune("merge", qlora, "--out", out, "--storage", NF4, "--json")


def test_a_requantised_model_is_a_base_that_does_what_was_measured(qlora, requantised, data):
    folder, done = requantised
    assert (done.code, done.err) == (0, "")
    said = json.loads(done.out)
    made = library.load(str(folder), labels=open_adapter(qlora).saved.labels)
    assert len(quantised_layers(made.model)) == said["layers"] == 13
    assert storages_of(made.model) == {"all-linear": f"{NF4},double=true"}
    adapted = open_adapter(qlora, precision="fp32")
    assert 0 < said["mean_difference"] < said["largest_difference"]
    validation = library.load_data(str(data)).validation
    tokens = tokenize(validation, made.tokenizer, 256)
    before, after = (task_for(base, "fp32").evaluate(tokens) for base in (adapted.base, made))
    assert (said["loss_before"], said["accuracy_before"]) == pytest.approx((before.loss, before.quality))
    assert (said["loss_after"], said["accuracy_after"]) == pytest.approx((after.loss, after.quality))
    assert said["loss_after"] != said["loss_before"]


def test_fewer_bits_lose_more(qlora, requantised, tmp_path):
    done = deltatune("merge", qlora, "--out", tmp_path / "model", "--storage", "int8", "--json")
    assert json.loads(done.out)["mean_difference"] < json.loads(requantised[1].out)["mean_difference"] / 3


def test_the_loss_of_accuracy_is_shown_and_a_tolerance_holds_for_it_too(qlora, tmp_path):
    shown = deltatune("merge", qlora, "--out", tmp_path / "shown", "--storage", NF4)
    assert all(word in shown.out for word in ("loss_before", "loss_after", "accuracy_before", "accuracy_after", NF4))
    words = ("--storage", NF4, "--tolerance", 1e-6)
    assert_refused(deltatune("merge", qlora, "--out", tmp_path / "model", *words), "merging changes", "--storage")
    assert not (tmp_path / "model").exists()


def test_a_requantised_adapter_whose_data_is_gone_is_not_scored_and_that_is_said(base, tmp_path, caplog):
    data = write_reviews(tmp_path / "reviews.csv")
    words = ("--base", base, "--data", data, "--method", "head", "--epochs", 1, "--training", "batch_tokens=128")
    assert deltatune("tune", *words, "--out", tmp_path / "tuned").code == 0
    data.unlink()
    done = deltatune("merge", tmp_path / "tuned", "--out", tmp_path / "model", "--storage", NF4, "--json")
    assert done.code == 0
    assert "not scored on its validation split: there is no file" in caplog.text
    assert "loss_before" not in json.loads(done.out)


@pytest.mark.parametrize(
    ("storage", "error"), [("nf5", "no storage named 'nf5'"), ("nf4:block=0", "power of two"), ("", "empty storage")]
)
def test_a_storage_that_cannot_be_is_refused(tuned, tmp_path, storage, error):
    assert_refused(deltatune("merge", tuned.folder, "--out", tmp_path / "model", "--storage", storage), error)
    assert not (tmp_path / "model").exists()


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
    done = deltatune("merge", tmp_path / "tuned", "--out", tmp_path / "model", "--storage", "fp32", "--json")
    assert (json.loads(done.out)["layers"], json.loads(done.out)["largest_difference"]) == (0, 0.0)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    adapted = open_adapter(tmp_path / "tuned", precision="fp32").base
    assert bits(model).keys() == bits(adapted.model).keys()
    assert all(torch.equal(value, adapted.model.state_dict()[name]) for name, value in model.state_dict().items())
