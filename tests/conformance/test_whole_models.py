"""The laws of a method on a whole model, for every registered method on every tiny architecture."""

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import deltatune
from conformance.cases import DELTAS, EVERY, INSERTS, OVER_LAYERS, PEFT_LACKS, bits, shaken
from deltatune.errors import UserError
from deltatune.files import read_json, write_json
from deltatune.methods import BlockInsert, Method, OverLayers
from deltatune.models.adapters import TENSORS
from deltatune.models.attach import adapted_layers, trainable_parameters
from deltatune.training.checkpointing import checkpointing
from tiny import ARCHITECTURES, tiny_inputs, tiny_model

PLAIN = {name: method for name, method in EVERY.items() if "," not in name}
PLAIN_OVER_LAYERS = {name: method for name, method in OVER_LAYERS.items() if "," not in name}
every_method = pytest.mark.parametrize("method", PLAIN.values(), ids=PLAIN.keys())
every_over_layers = pytest.mark.parametrize("method", OVER_LAYERS.values(), ids=OVER_LAYERS.keys())
every_insert = pytest.mark.parametrize("method", INSERTS.values(), ids=INSERTS.keys())


FEW = ("bert", "gpt2")
"""An encoder, and a decoder with `Conv1D`: for laws that the architecture hardly touches."""


def on_models(methods: dict[str, Method], architectures: tuple[str, ...] = ARCHITECTURES) -> pytest.MarkDecorator:
    """Every method on every one of these architectures; variants of a method on an encoder alone."""
    pairs = {
        f"{architecture}-{name}": (architecture, method)
        for name, method in methods.items()
        for architecture in (("bert",) if "," in name else architectures)
    }
    return pytest.mark.parametrize(("architecture", "method"), pairs.values(), ids=pairs.keys())


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs()).logits


def trained(architecture: str, method: Method, seed: int = 0) -> PreTrainedModel:
    """The tiny base with the method, its parameters shaken as if it had been trained."""
    return shaken(deltatune.attach(tiny_model(architecture, seed=seed), method))


@on_models(PLAIN, FEW)
def test_training_starts_at_the_base(architecture: str, method: Method) -> None:
    model = deltatune.attach(tiny_model(architecture), method)
    if isinstance(method, OverLayers) and any(method.start_distance(s.site) for s in adapted_layers(model).values()):
        return  # how far from it is a law over one weight
    torch.testing.assert_close(logits(model), logits(tiny_model(architecture)))


@on_models(PLAIN, FEW)
def test_only_what_the_method_states_trains(architecture: str, method: Method) -> None:
    base = tiny_model(architecture)
    head = sum(p.numel() for name, p in base.named_parameters() if not name.startswith(base.base_model_prefix + "."))
    model = deltatune.attach(tiny_model(architecture), method)
    count = sum(p.numel() for p in trainable_parameters(model).values())
    if isinstance(method, OverLayers):
        sites = [layer.site for layer in adapted_layers(model).values() if layer.delta is not None]
        assert count == head + sum(map(method.parameters, sites)) + method.shared_parameters(sites)
        assert sites
    else:
        chosen = sum(p.numel() for part in model.attachment.parts for p in part.trained())
        assert count == head + chosen
    before = bits(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(**tiny_inputs(), labels=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    assert any(not torch.equal(after[name], before[name]) for name in trainable_parameters(model))


@on_models(DELTAS, FEW)
def test_merging_keeps_the_output_and_unmerging_the_base(architecture: str, method: Method) -> None:
    model = trained(architecture, method)
    before, weights = logits(model), bits(model)
    merged = deltatune.merge(model, tiny_inputs())
    assert merged.layers == len(adapted_layers(model))
    assert merged.difference == (logits(model) - before).abs().max().item() < 1e-4 * max(1, before.abs().max().item())
    deltatune.unmerge(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    folded = deltatune.fold(model)
    assert not adapted_layers(folded)
    assert folded.state_dict().keys() == tiny_model(architecture).state_dict().keys()
    torch.testing.assert_close(logits(folded), before, atol=1e-4, rtol=1e-4)


@every_insert
def test_a_method_without_a_merged_weight_refuses_to_merge_and_says_why(method: BlockInsert) -> None:
    model = trained("bert", method)
    before, output = bits(model), logits(model)
    for act in (deltatune.merge, deltatune.fold):
        with pytest.raises(UserError, match=f"{method.name} cannot be merged: it is not linear"):
            act(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), output)


@on_models(PLAIN_OVER_LAYERS, FEW)
def test_a_disabled_method_is_the_base(architecture: str, method: Method) -> None:
    model = trained(architecture, method)
    plain = tiny_model(architecture)
    plain.load_state_dict(
        {name.replace(".base.", "."): value for name, value in model.state_dict().items()}, strict=False
    )
    before = logits(model)
    with deltatune.disabled(model):
        assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), before)
    assert not torch.equal(before, logits(plain))


@on_models(EVERY, FEW)
def test_a_saved_adapter_loads_to_the_same_bits(architecture: str, method: Method, tmp_path: Path) -> None:
    model = trained(architecture, method)
    deltatune.save_adapter(model, tmp_path / "adapter", base="tiny")
    loaded = deltatune.load_adapter(tiny_model(architecture), tmp_path / "adapter")
    if isinstance(method, OverLayers) and not method.lossless:
        torch.testing.assert_close(logits(loaded), logits(model))
        return
    if isinstance(method, OverLayers) and method.portable() != method:  # the file is that of another method
        torch.testing.assert_close(logits(loaded), logits(model))
        deltatune.save_adapter(loaded, tmp_path / "again", base="tiny")
        before, after = load_file(tmp_path / "adapter" / TENSORS), load_file(tmp_path / "again" / TENSORS)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        return
    assert torch.equal(logits(loaded), logits(model))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


@every_insert
def test_the_files_in_peft_s_layout_alone_give_the_same_logits(method: BlockInsert, tmp_path: Path) -> None:
    model = trained("bert", method)
    deltatune.save_adapter(model, tmp_path)
    (tmp_path / "deltatune.json").unlink()
    assert torch.equal(logits(deltatune.load_adapter(tiny_model("bert"), tmp_path)), logits(model))


@every_method
def test_a_saved_adapter_refuses_another_base(method: Method, tmp_path: Path) -> None:
    deltatune.save_adapter(trained("bert", method), tmp_path / "adapter", base="tiny")
    with pytest.raises(UserError, match="trained on another base"):
        deltatune.load_adapter(tiny_model("bert", seed=1), tmp_path / "adapter")
    with pytest.raises(UserError):
        deltatune.load_adapter(tiny_model("llama"), tmp_path / "adapter")


@every_method
def test_an_adapter_is_one_adapter_whatever_type_the_base_is_loaded_in(method: Method, tmp_path: Path) -> None:
    deltatune.save_adapter(trained("bert", method), tmp_path / "adapter", base="tiny")
    deltatune.load_adapter(tiny_model("bert").bfloat16(), tmp_path / "adapter")


@every_method
def test_missing_unexpected_misshapen_and_non_finite_tensors_are_refused_by_name(
    method: Method, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    deltatune.save_adapter(trained("bert", method), folder, base="tiny")
    whole = load_file(folder / TENSORS)
    some = min(name for name, tensor in whole.items() if tensor.is_floating_point())

    def refused(tensors: dict[str, torch.Tensor], why: str) -> None:
        changed = shutil.copytree(folder, tmp_path / why)
        record = read_json(changed / "deltatune.json")
        save_file(tensors, changed / TENSORS)
        write_json(changed / "deltatune.json", {**record, "sha256": {}})
        with pytest.raises(UserError, match=why):
            deltatune.load_adapter(tiny_model("bert"), changed)

    refused({name: tensor for name, tensor in whole.items() if name != some}, "lacks")
    refused({**whole, "base_model.model.stranger": torch.ones(2)}, "unknown tensor")
    refused({**whole, some: torch.ones(3, 3, 3)}, "shape")
    refused({**whole, some: whole[some].int()}, "whole numbers")
    refused({**whole, some: whole[some].fill_(torch.nan)}, "not finite")


@every_method
def test_a_flipped_byte_in_a_saved_adapter_is_noticed(method: Method, tmp_path: Path) -> None:
    deltatune.save_adapter(trained("bert", method), tmp_path / "adapter", base="tiny")
    file = tmp_path / "adapter" / TENSORS
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        deltatune.load_adapter(tiny_model("bert"), tmp_path / "adapter")


@every_method
def test_non_finite_values_are_never_saved(method: Method, tmp_path: Path) -> None:
    model = trained("bert", method)
    with torch.no_grad():
        next(iter(trainable_parameters(model).values())).fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        deltatune.save_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@on_models(PLAIN, FEW)
def test_gradient_checkpointing_changes_nothing(architecture: str, method: Method) -> None:
    def gradients(on: bool) -> dict[str, torch.Tensor]:
        model = trained(architecture, method).train()
        model.config.use_cache = False
        torch.manual_seed(0)
        with checkpointing(model, on):
            model(**tiny_inputs(), labels=torch.tensor([0, 1, 2])).loss.backward()
        return {name: p.grad for name, p in trainable_parameters(model).items() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def read_by_peft(architecture: str, method: Method, folder: Path) -> peft.PeftModel:
    """Our adapter in PEFT; where that cannot adapt such layers the test ends, once PEFT has said so itself."""
    if architecture in PEFT_LACKS.get(method.name, ()):
        with warnings.catch_warnings(action="ignore"), pytest.raises(TypeError, match="not supported"):
            peft.PeftModel.from_pretrained(tiny_model(architecture), folder)
        pytest.skip(f"PEFT's {method.name} does not adapt the layers of {architecture}")
    return peft.PeftModel.from_pretrained(tiny_model(architecture), folder)


@on_models(DELTAS)
def test_peft_loads_ours_and_gives_the_same_logits(architecture: str, method: OverLayers, tmp_path: Path) -> None:
    model = trained(architecture, method)
    deltatune.save_adapter(model, tmp_path / "adapter", base="tiny")
    theirs = read_by_peft(architecture, method, tmp_path / "adapter").eval()
    # T5 does not scale its attention scores, so rounding grows on its way.
    close = 3e-4 if architecture == "t5" else 1e-5
    torch.testing.assert_close(logits(theirs), logits(model), atol=close, rtol=close)


@on_models(DELTAS, FEW)
def test_what_peft_saves_again_loads_here_with_the_same_logits(
    architecture: str, method: OverLayers, tmp_path: Path
) -> None:
    model = trained(architecture, method)
    deltatune.save_adapter(model, tmp_path / "ours")
    read_by_peft(architecture, method, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    loaded = deltatune.load_adapter(tiny_model(architecture), tmp_path / "theirs")
    torch.testing.assert_close(logits(loaded), logits(model))
    assert load_file(tmp_path / "theirs" / TENSORS).keys() == load_file(tmp_path / "ours" / TENSORS).keys()


@every_over_layers
def test_targets_that_match_nothing_are_refused_and_the_model_left_alone(method: OverLayers) -> None:
    model = tiny_model("bert")
    before = set(model.state_dict())
    with pytest.raises(UserError, match="'qurey' matches no layer") as caught:
        deltatune.attach(model, replace(method, targets=("value", "qurey")))
    assert "query" in caught.value.hint
    assert set(model.state_dict()) == before
