"""(IA)³ against the paper and PEFT's adapters."""

from pathlib import Path

import peft
import pytest
import torch

import deltatune
from conformance.cases import shaken
from deltatune import IA3
from deltatune.errors import UserError
from deltatune.files import read_json
from deltatune.methods import make
from deltatune.models.adapters import CONFIG
from deltatune.models.attach import adapted_layers
from peer import peft_adapter
from tiny import tiny_inputs, tiny_model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs()).logits


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("bert", {}),  # PEFT's own choice scales the input of attention.output.dense as well
        ("bert", {"target_modules": ["query", "intermediate.dense"], "feedforward_modules": ["intermediate.dense"]}),
        ("bert", {"target_modules": r".*\.(key|value)"}),  # its default feedforward_modules are none of these
        ("bert", {"target_modules": ["dense", "key"], "feedforward_modules": r"bert\.encoder\.layer\.1\..*dense"}),
        ("bert", {"target_modules": ["key", "value"], "feedforward_modules": []}),
        ("distilbert", {"target_modules": ["k_lin", "lin2"], "feedforward_modules": ["lin2"]}),
        ("gpt2", {"fan_in_fan_out": True}),
        ("llama", {}),
        ("qwen2", {"target_modules": "all-linear", "feedforward_modules": ["proj"]}),  # the end of every name
        ("t5", {"target_modules": ["k", "v", "o", "wo"], "feedforward_modules": ["o"]}),  # also wo ends in o
    ],
)
def test_an_adapter_that_peft_made_gives_its_logits_here(architecture: str, options: dict, tmp_path: Path) -> None:
    config = peft.IA3Config(task_type="SEQ_CLS", **options)
    theirs = peft_adapter(tmp_path, architecture, config)
    ours = deltatune.load_adapter(tiny_model(architecture), tmp_path)
    torch.testing.assert_close(logits(ours), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        IA3(),
        IA3(scales="output"),
        IA3(targets="all-linear", scales_pattern={"query": "input"}),
        IA3(targets="all-linear", scales_pattern={r"layer\.1\..*key": "input", "mlp-down": "output"}),
    ],
)
def test_peft_scales_the_same_sides_as_ours(method: IA3, tmp_path: Path) -> None:
    model = shaken(deltatune.attach(tiny_model("bert"), method))
    deltatune.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)
    again = deltatune.load_adapter(tiny_model("bert"), tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "llama", "t5"])
def test_keys_and_values_and_the_second_layer_of_the_mlp_are_scaled(architecture: str) -> None:
    layers = adapted_layers(deltatune.attach(tiny_model(architecture), IA3()))
    assert {layer.site.role for layer in layers.values()} == {"key", "value", "down"}
    for layer in layers.values():
        size = layer.site.in_ if layer.site.role == "down" else layer.site.out
        assert [(name, p.shape) for name, p in layer.delta.named_parameters()] == [("factors", (size,))]


def test_a_layer_of_bert_base_has_as_many_factors_as_the_paper_says() -> None:
    width, hidden = 768, 3072
    key, down = deltatune.methods.Site(width, width, role="key"), deltatune.methods.Site(width, hidden, role="down")
    assert 2 * IA3().parameters(key) + IA3().parameters(down) == width + width + hidden


def test_the_factors_of_one_fused_matrix_scale_its_whole_output() -> None:
    layers = adapted_layers(deltatune.attach(tiny_model("gpt2"), IA3()))
    assert {path.rpartition(".")[2]: len(layer.delta.factors) for path, layer in layers.items()} == {
        "c_attn": 3 * 32, "c_proj": 4 * 32,
    }  # fmt: skip


def test_a_merged_layer_has_its_bias_scaled_with_the_output() -> None:
    model = shaken(deltatune.attach(tiny_model("bert"), IA3()))
    value = adapted_layers(model)["bert.encoder.layer.0.attention.self.value"]
    with torch.no_grad():
        value.base.bias.normal_()
    before, bias = logits(model), value.base.bias.clone()
    deltatune.merge(model)
    assert torch.equal(value.bias, bias * value.delta.factors)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-4)
    deltatune.unmerge(model)
    assert torch.equal(value.bias, bias)


def test_a_tensor_on_the_other_side_than_the_config_says_is_refused(tmp_path: Path) -> None:
    model = deltatune.attach(tiny_model("bert"), IA3(targets="mlp-down"))
    deltatune.save_adapter(model, tmp_path)
    (tmp_path / "deltatune.json").unlink()
    config = (tmp_path / CONFIG).read_text()
    assert read_json(tmp_path / CONFIG)["feedforward_modules"] == r"(?:.*\.)?dense"
    (tmp_path / CONFIG).write_text(config.replace(r'"(?:.*\\.)?dense"', "[]"))
    with pytest.raises(UserError, match=r"has shape \[1, 64\], the base needs \[32, 1\]"):
        deltatune.load_adapter(tiny_model("bert"), tmp_path)


def test_no_factor_is_decayed() -> None:
    model = deltatune.attach(tiny_model("bert"), IA3())
    assert all(layer.delta.factors.ndim == 1 for layer in adapted_layers(model).values())


def test_another_side_than_input_or_output_is_refused() -> None:
    with pytest.raises(UserError, match="scales = 'both'") as caught:
        make("ia3", {"scales": "both"})
    assert "its input or its output" in caught.value.hint
