"""Bases in 4 bits: loaded, adapted, merged, saved and refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import deltatune
from conformance.cases import DELTAS, bits, shaken
from deltatune.errors import UserError
from deltatune.methods import WeightDelta
from deltatune.models.adapted import quantised_layers
from deltatune.models.attach import adapted_layers
from deltatune.models.base import outline
from deltatune.models.fingerprint import fingerprint
from deltatune.models.places import find_base
from deltatune.models.quantise import quantise, read_storages, storages_of, total_parameters
from deltatune.weights import QuantisedLinear
from tiny import save_tiny, tiny_inputs, tiny_model, tokenizer

NF4 = "nf4:block=16"
LABELS = ("a", "b")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: save_tiny(root / name, name) for name in ("bert", "gpt2", "llama", "t5")}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs()).logits


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "t5"])
def test_loading_quantised_is_loading_and_then_quantising(architecture: str, folders: dict[str, Path]) -> None:
    folder = str(folders[architecture])
    plain = deltatune.load(folder, labels=LABELS).model
    linear = {path for path, layer in plain.named_modules() if type(layer).__name__ in ("Linear", "Conv1D")}
    model = deltatune.load(folder, labels=LABELS, storage=NF4).model
    head = {path for path in linear if not path.startswith(model.base_model_prefix + ".")}
    assert quantised_layers(model).keys() == linear - head
    assert same(model.state_dict(), quantise(plain, NF4).state_dict())
    assert model.newly_initialised == deltatune.load(folder, labels=LABELS).model.newly_initialised


def test_what_is_stored_does_not_depend_on_the_type_of_the_rest(folders: dict[str, Path]) -> None:
    folder = str(folders["bert"])
    one = deltatune.load(folder, labels=LABELS, storage=NF4).model
    half = deltatune.load(folder, labels=LABELS, storage=NF4, dtype=torch.bfloat16).model
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert fingerprint(one) == fingerprint(half)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_a_saved_quantised_model_is_a_base_again(architecture: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = deltatune.load(str(folders[architecture]), labels=LABELS, storage=NF4).model
    model.save_pretrained(tmp_path)
    tokenizer(architecture).save_pretrained(tmp_path)
    again = deltatune.load(str(tmp_path), labels=LABELS).model
    assert same(again.state_dict(), model.state_dict())
    assert torch.equal(logits(again), logits(model))
    assert storages_of(again) == storages_of(model) == {"all-linear": "nf4:block=16,double=true"}
    with pytest.raises(UserError, match="cannot be stored as"):
        deltatune.load(str(tmp_path), labels=LABELS, storage="int8")


def test_targets_can_have_storages_of_their_own(folders: dict[str, Path]) -> None:
    storage = {"all-linear": "nf4", "attention": "int8:block=32", "query": "fp32"}
    layers = quantised_layers(deltatune.load(str(folders["bert"]), labels=LABELS, storage=storage).model)
    formats = {path.removeprefix("bert.encoder.layer.1."): layer.storage.format for path, layer in layers.items()}
    assert formats["intermediate.dense"] == "nf4"
    assert formats["attention.output.dense"] == formats["attention.self.key"] == "int8"
    assert formats["attention.self.query"] == "fp32"


FEW = ("lora", "dora", "vblora", "waveft")
"""The laws over one weight hold every method to quantised ones; here it is about the model around them."""
few_methods = pytest.mark.parametrize("method", [DELTAS[name] for name in FEW], ids=FEW)


def adapted(method: WeightDelta, architecture: str = "bert") -> PreTrainedModel:
    return deltatune.attach(quantise(tiny_model(architecture), NF4), method)


@few_methods
def test_a_step_trains_the_adapter_alone_and_checkpointing_changes_nothing(method: WeightDelta) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = shaken(adapted(method)).train()
        before = {path: bits(layer) for path, layer in quantised_layers(model).items()}
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model(**tiny_inputs(), labels=torch.tensor([0, 1, 2])).loss.backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert all(same(bits(layer), before[path]) for path, layer in quantised_layers(model).items())
        return found

    plain, checkpointed = gradients(False), gradients(True)
    assert plain
    assert all(torch.equal(gradient, checkpointed[name]) for name, gradient in plain.items())


@few_methods
def test_merging_makes_ordinary_layers_and_unmerging_puts_the_codes_back(method: WeightDelta) -> None:
    model = shaken(adapted(method, "gpt2"))
    before, held = logits(model), bits(model)
    merged = deltatune.merge(model, tiny_inputs())
    assert merged.difference < 1e-4 * max(1, before.abs().max().item())
    assert not any(isinstance(layer.base, QuantisedLinear) for layer in adapted_layers(model).values())
    assert same(bits(deltatune.unmerge(model)), held)
    folded = deltatune.dequantise(deltatune.fold(model))
    assert folded.state_dict().keys() == tiny_model("gpt2").state_dict().keys()
    torch.testing.assert_close(logits(folded), before, atol=1e-4, rtol=1e-4)


@few_methods
def test_a_saved_adapter_loads_over_the_same_storage_and_no_other(method: WeightDelta, tmp_path: Path) -> None:
    model = shaken(adapted(method))
    deltatune.save_adapter(model, tmp_path, base="tiny")
    loaded = deltatune.load_adapter(quantise(tiny_model("bert"), NF4), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model))
    with pytest.raises(UserError, match=r"nf4:block=16,double=true .all-linear., not as it came, unquantised"):
        deltatune.load_adapter(tiny_model("bert"), tmp_path)
    with pytest.raises(UserError, match="stored as nf4:block=16,double=true"):
        deltatune.load_adapter(quantise(tiny_model("bert"), "nf4:block=32"), tmp_path)
    with pytest.raises(UserError, match="weights of this one are not those"):
        deltatune.load_adapter(quantise(tiny_model("bert", seed=1), NF4), tmp_path)


def test_an_adapter_of_a_plain_base_refuses_a_quantised_one(tmp_path: Path) -> None:
    deltatune.save_adapter(deltatune.attach(tiny_model("bert"), deltatune.LoRA(rank=2)), tmp_path)
    with pytest.raises(UserError, match="not as nf4") as caught:
        deltatune.load_adapter(quantise(tiny_model("bert"), NF4), tmp_path)
    assert "without a storage" in caught.value.hint


def test_a_merged_layer_has_the_type_of_the_run_and_the_others_stay_stored() -> None:
    from deltatune.training.precision import prepare

    model = shaken(adapted(deltatune.LoRA(rank=2, targets="query")))
    prepare(model, "bf16")
    deltatune.merge(model)
    assert {layer.base.weight.dtype for layer in adapted_layers(model).values()} == {torch.bfloat16}
    folded = deltatune.fold(deltatune.unmerge(model))
    assert isinstance(folded.bert.encoder.layer[0].attention.self.key, QuantisedLinear)
    assert "bert.encoder.layer.0.attention.self.query" not in str(folded.config.quantization_config)
    assert not quantised_layers(deltatune.dequantise(folded))
    assert not hasattr(folded.config, "quantization_config")


def test_a_method_that_trains_the_weights_themselves_is_refused() -> None:
    with pytest.raises(UserError, match=r"full trains bert.*stored as nf4"):
        deltatune.attach(quantise(tiny_model("bert"), NF4), deltatune.Full())
    deltatune.attach(quantise(tiny_model("bert"), NF4), deltatune.Head())


def test_the_outline_and_the_count_know_the_storage(folders: dict[str, Path]) -> None:
    sketch = outline(find_base(str(folders["bert"])), labels=LABELS, storage=NF4)
    model = deltatune.load(str(folders["bert"]), labels=LABELS, storage=NF4).model
    assert quantised_layers(sketch).keys() == quantised_layers(model).keys()
    plain = sum(parameter.numel() for parameter in tiny_model("bert", labels=2).parameters())
    assert total_parameters(model) == total_parameters(sketch) == plain


def changed(folder: Path, into: Path, **config: object) -> Path:
    """A copy of a base with other fields in its configuration."""
    for file in folder.iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    known = json.loads((into / "config.json").read_text())
    (into / "config.json").write_text(json.dumps({**known, **config}))
    return into


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "never-heard-of"])
def test_a_base_that_is_quantised_in_another_way_is_refused(
    method: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(folders["bert"], tmp_path, quantization_config={"quant_method": method, "load_in_4bit": True})
    with pytest.raises(UserError, match=f"quantised already, by {method}"):
        deltatune.load(str(folder), labels=LABELS)
    with pytest.raises(UserError, match=f"quantised already, by {method}"):
        outline(find_base(str(folder)), labels=LABELS)


UNFIT_NOTES = {
    "no mapping": ("nf4", "could not read the configuration"),
    "nothing but its name": ({"quant_method": "deltatune"}, "does not say how it is quantised"),
    "a layer that it has not": (
        {"quant_method": "deltatune", "storages": {"all-linear": "nf4"}, "layers": {"nf4": ["bert.nowhere"]}},
        "bert.nowhere, which is no linear layer",
    ),
    "a storage that is none": (
        {"quant_method": "deltatune", "storages": {"all-linear": "nf9"}, "layers": {"nf9": ["bert.pooler.dense"]}},
        "no storage named 'nf9'",
    ),
}


@pytest.mark.parametrize(("noted", "message"), UNFIT_NOTES.values(), ids=UNFIT_NOTES)
def test_a_configuration_that_says_wrongly_how_it_is_quantised_is_refused(
    noted: object, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        deltatune.load(str(changed(folders["bert"], tmp_path, quantization_config=noted)), labels=LABELS)


def test_weights_in_8_bits_are_refused_though_the_configuration_is_silent(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(folders["bert"], tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    weights[name] = weights[name].mul(20).to(torch.int8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"quantised already: it stores {name} as I8"):
        deltatune.load(str(folder), labels=LABELS)


def test_a_scale_that_is_not_finite_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    model = deltatune.load(str(folders["bert"]), labels=LABELS, storage=NF4).model
    model.bert.pooler.dense.offset.fill_(torch.inf)
    model.save_pretrained(tmp_path)
    tokenizer("bert").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"bert\.pooler\.dense\.offset has values that are not finite"):
        deltatune.load(str(tmp_path), labels=LABELS)


def test_a_weight_that_is_not_finite_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(folders["bert"], tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["bert.encoder.layer.1.output.dense.weight"][3, 4] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"layer\.1\.output\.dense\.weight: .*not finite"):
        deltatune.load(str(folder), labels=LABELS, storage="nf4")


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("nf5", "no storage named 'nf5'"),
        ("nf4:block=0", "power of two"),
        ({"qurey": "nf4"}, "'qurey' matches no layer"),
        ("{mlp: 4}", "is no storage"),
        ("{mlp", "is no mapping"),
    ],
)
def test_a_storage_that_cannot_be_is_refused(storage: object, message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=message):
        deltatune.load(str(folders["bert"]), labels=LABELS, storage=storage)


def test_words_become_storages_by_target() -> None:
    assert read_storages("") == {}
    assert read_storages("nf2") == {"all-linear": "nf2:block=64,double=true"}
    assert read_storages("{mlp: nf4, attention: bf16}") == {"mlp": "nf4:block=64,double=true", "attention": "bf16"}
