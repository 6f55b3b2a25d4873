"""Adapter folders and PEFT: what PEFT makes loads here, what we make loads there, and nothing is written by halves."""

import json
from pathlib import Path

import peft
import pytest
import torch

import deltatune
from conformance.cases import shaken
from deltatune import LoRA
from deltatune.errors import UserError
from deltatune.models.adapters import ABOUT, CONFIG, TENSORS
from peer import peft_adapter
from tiny import tiny_inputs, tiny_language_model, tiny_model


def lora_of_peft(folder: Path, architecture: str, **options) -> torch.Tensor:
    """Writes a LoRA adapter that PEFT made, with random values, and gives its logits."""
    return peft_adapter(folder, architecture, peft.LoraConfig(task_type="SEQ_CLS", **options))


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("bert", {"r": 4, "lora_alpha": 12, "target_modules": ["query", "value"]}),
        ("bert", {"r": 4, "target_modules": "all-linear"}),
        ("bert", {"r": 4, "use_rslora": True, "target_modules": r".*\.(key|output\.dense)"}),
        ("bert", {"r": 4, "target_modules": ["query", "key"], "rank_pattern": {"key": 2, r"0\..*query": 3}}),
        ("bert", {"r": 4, "target_modules": ["query", "key"], "alpha_pattern": {"layer.1.attention.self.key": 5}}),
        ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("roberta", {"r": 4, "target_modules": ["query", "value"]}),
        ("distilbert", {"r": 4, "target_modules": ["q_lin"], "modules_to_save": ["pre_classifier", "classifier"]}),
        ("llama", {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
        ("qwen2", {"r": 4, "target_modules": ["k_proj"]}),
    ],
)
def test_an_adapter_that_peft_made_gives_its_logits_here(architecture: str, options: dict, tmp_path: Path) -> None:
    theirs = lora_of_peft(tmp_path, architecture, **options)
    model = deltatune.load_adapter(tiny_model(architecture), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(**tiny_inputs()).logits, theirs, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_peft_made_can_be_trained_further_and_saved_here(tmp_path: Path) -> None:
    lora_of_peft(tmp_path / "theirs", "bert", r=4, target_modules=["query"])
    model = shaken(deltatune.load_adapter(tiny_model("bert"), tmp_path / "theirs"), seed=9)
    deltatune.save_adapter(model, tmp_path / "ours")
    loaded = deltatune.load_adapter(tiny_model("bert"), tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(loaded(**tiny_inputs()).logits, model(**tiny_inputs()).logits)


@pytest.mark.parametrize("options", [{"bias": "all"}])
def test_what_would_change_the_output_and_is_not_supported_is_refused(options: dict, tmp_path: Path) -> None:
    lora_of_peft(tmp_path, "bert", r=4, target_modules=["query"], **options)
    with pytest.raises(UserError, match=next(iter(options))):
        deltatune.load_adapter(tiny_model("bert"), tmp_path)


def test_other_types_of_adapter_are_refused_by_name(tmp_path: Path) -> None:
    lora_of_peft(tmp_path, "bert", r=4, target_modules=["query"])
    config = tmp_path / CONFIG
    config.write_text(config.read_text().replace('"LORA"', '"POLY"'))
    with pytest.raises(UserError, match="POLY"):
        deltatune.load_adapter(tiny_model("bert"), tmp_path)


@pytest.mark.parametrize(
    "method", [LoRA(rank=2, rank_pattern={"mlp": 5}, alpha_pattern={"query": 3.0}), LoRA(targets="mlp")]
)
def test_peft_reads_the_ranks_alphas_and_targets_of_ours(method: LoRA, tmp_path: Path) -> None:
    model = shaken(deltatune.attach(tiny_model("bert"), method))
    deltatune.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**tiny_inputs()).logits, model(**tiny_inputs()).logits, atol=1e-5, rtol=1e-5)


def test_the_folder_says_what_it_is_for(tmp_path: Path) -> None:
    model = deltatune.attach(tiny_model("bert"), LoRA(rank=2, targets=("query", "value")))
    deltatune.save_adapter(
        model, tmp_path / "a", base="some/base", revision="c0ffee" * 6 + "abcd", labels=["나쁘다", "좋다", "grey"]
    )
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == 2
    assert config["target_modules"] == ["query", "value"]
    assert config["modules_to_save"] == ["classifier"]
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/base", "c0ffee" * 6 + "abcd")
    assert list(config) == sorted(config)
    about = json.loads((tmp_path / "a" / ABOUT).read_text())
    assert about["labels"] == ["나쁘다", "좋다", "grey"]
    assert about["options"]["alpha"] is None
    assert about["base"]["id"] == "some/base"
    saved = deltatune.read_adapter(tmp_path / "a")
    assert saved.method == LoRA(rank=2, targets=("query", "value"))
    assert saved.labels == ("나쁘다", "좋다", "grey")


def test_a_failed_save_leaves_the_old_adapter_whole(tmp_path: Path) -> None:
    model = deltatune.attach(tiny_model("bert"), LoRA(rank=2))
    deltatune.save_adapter(model, tmp_path / "a")
    before = (tmp_path / "a" / TENSORS).read_bytes()
    with pytest.raises(TypeError):
        deltatune.save_adapter(model, tmp_path / "a", labels=object())
    assert (tmp_path / "a" / TENSORS).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_missing_folder_is_said_to_hold_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no adapter"):
        deltatune.read_adapter(tmp_path / "nothing")


def test_tensors_in_other_formats_are_not_read(tmp_path: Path) -> None:
    lora_of_peft(tmp_path, "bert", r=4, target_modules=["query"])
    (tmp_path / TENSORS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="missing"):
        deltatune.load_adapter(tiny_model("bert"), tmp_path)


@pytest.mark.parametrize(("architecture", "use"), [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_the_file_of_a_language_models_adapter_says_what_it_is_for(architecture: str, use: str, tmp_path: Path) -> None:
    model = deltatune.attach(tiny_language_model(architecture), deltatune.LoRA(rank=2))
    deltatune.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] == use
