"""Several methods as one adapter: each part is what it is alone, and what means nothing is refused."""

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import deltatune
from command import deltatune as command
from conformance.cases import bits, shaken
from deltatune import IA3, BitFit, DoRA, Full, Head, LastK, LoRA, Mixed, Norms, Select, make
from deltatune.comparing.choices import MethodChoice
from deltatune.errors import UserError
from deltatune.files import read_json
from deltatune.methods import Method, options_of, parse
from deltatune.models.adapters import TENSORS
from deltatune.models.attach import adapted_layers, learning_rates, trainable_parameters
from deltatune.models.count import count
from deltatune.models.places import find_base
from tiny import save_tiny, tiny_inputs, tiny_model

MIXES = {
    words: make(*parse(words))
    for words in (
        "lora+norms",
        "lora:rank=2,dropout=0.1+bitfit",
        "dora:rank=2+norms",
        "lora:rank=2,targets=attention+ia3:targets=mlp-down",
        "lora:rank=2,targets=query+select:parameters=[value, down]",
        "ia3+bitfit",
        "prefix+norms",
        "lora:rank=2+prefix:virtual_tokens=4",
        "bitfit+prompt:virtual_tokens=4",
        "lora:targets=attention-qv+parallel",
        "parallel+prefix:virtual_tokens=4+norms",
    )
}
every_mix = pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
LABELS = torch.tensor([0, 1, 2])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs()).logits


def trains(method: Method) -> set[str]:
    return set(trainable_parameters(deltatune.attach(tiny_model("bert"), method)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("bases") / "bert", "bert")


@every_mix
def test_a_mix_trains_what_its_parts_train_and_nothing_else(mix: Mixed) -> None:
    model = deltatune.attach(tiny_model("bert"), mix).train()
    plain = {name.replace(".base.", ".") for name in trainable_parameters(model)}
    assert plain == {name.replace(".base.", ".") for part in mix.parts for name in trains(part)}
    before = bits(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # what a part multiplies by zero gets its gradient in the second step
        model(**tiny_inputs(), labels=LABELS).loss.backward()
        optimizer.step()
    after = model.state_dict()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.requires_grad or torch.equal(after[name], before[name])


@every_mix
def test_counted_parameters_are_the_actual_and_the_saved_ones(mix: Mixed, folder: Path, tmp_path: Path) -> None:
    counted = count(find_base(str(folder)), mix, ("0", "1"))
    model = deltatune.attach(deltatune.load(str(folder), labels=("0", "1")).model, mix)
    assert counted.trainable == sum(p.numel() for p in trainable_parameters(model).values())
    assert counted.total == sum(p.numel() for p in model.parameters())
    deltatune.save_adapter(model, tmp_path)
    assert counted.stored == sum(tensor.numel() for tensor in load_file(tmp_path / TENSORS).values())


@every_mix
def test_a_saved_mix_loads_to_the_same_bits_and_refuses_another_base(mix: Mixed, tmp_path: Path) -> None:
    model = shaken(deltatune.attach(tiny_model("bert"), mix))
    deltatune.save_adapter(model, tmp_path)
    config, record = read_json(tmp_path / "adapter_config.json"), read_json(tmp_path / "deltatune.json")
    assert config["peft_type"] == "DELTATUNE_MIXED"
    assert (record["method"], record["options"]) == (mix.name, options_of(mix))
    loaded = deltatune.load_adapter(tiny_model("bert"), tmp_path)
    assert torch.equal(logits(loaded), logits(model.eval()))
    assert loaded.attachment.method == mix
    assert deltatune.read_adapter(tmp_path).labels == ("0", "1", "2")
    with pytest.raises(UserError, match="trained on another base"):
        deltatune.load_adapter(tiny_model("bert", seed=1), tmp_path)
    with pytest.raises((ValueError, KeyError)):  # PEFT has one method to a folder
        peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path)


@every_mix
def test_merging_does_the_parts_that_can_be_and_names_the_one_that_cannot(mix: Mixed) -> None:
    model = shaken(deltatune.attach(tiny_model("bert"), mix)).eval()
    before, weights = logits(model), bits(model)
    stuck = [part.name for part in mix.parts if getattr(part, "unmergeable", "")]
    if stuck:
        with pytest.raises(UserError, match=f"{stuck[0]} cannot be merged"):
            deltatune.merge(model)
        return
    assert deltatune.merge(model, tiny_inputs()).layers == len(adapted_layers(model))
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
    deltatune.unmerge(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    folded = deltatune.fold(model)
    assert folded.state_dict().keys() == tiny_model("bert").state_dict().keys()
    torch.testing.assert_close(logits(folded), before, atol=1e-4, rtol=1e-4)


def test_parts_keep_the_ratio_of_their_own_rates() -> None:
    mix = Mixed(LoRA(rank=2, lr_ratio=4.0), Norms())
    rates = learning_rates(deltatune.attach(tiny_model("bert"), mix))
    ratio = Norms().learning_rate / LoRA().learning_rate
    assert mix.learning_rate == LoRA().learning_rate
    assert {rate for name, rate in rates.items() if "LayerNorm" in name} == {ratio}
    assert {rate for name, rate in rates.items() if name.endswith("default.B")} == {4.0}
    assert {rate for name, rate in rates.items() if name.endswith("default.A")} == {1.0}
    assert rates["classifier.weight"] == 1.0


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("lora+lora:rank=4", "lora is there twice"),
        ("full+lora", "full goes with nothing else"),
        ("lora+head", "head goes with nothing else"),
        ("lora+nroms", "there is no method named 'nroms'"),
        ("lora+", "there is no method named ''"),
    ],
)
def test_a_mix_that_means_nothing_is_refused(words: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        make(*parse(words))


@pytest.mark.parametrize(
    ("mix", "why"),
    [
        (Mixed(LoRA(rank=2), IA3()), "ia3 adapts .*, and so does another part"),
        (Mixed(LoRA(rank=2), LastK(k=1)), r"lora and last-k both change .*layer\.1.*weight"),
        (
            Mixed(Select(parameters="query"), LoRA(rank=2, targets="query")),
            "select and lora both change .*query.weight",
        ),
        (Mixed(BitFit(), LoRA(rank=2, bias="adapted")), "bitfit and lora both change .*bias"),
        (Mixed(Norms(), BitFit()), "norms and bitfit both change .*LayerNorm.bias"),
        (Mixed(LoRA(rank=2), Select(parameters="qurey")), "'qurey' names no parameter"),
    ],
    ids=lambda value: value.name if isinstance(value, Mixed) else "",
)
def test_parts_that_change_the_same_are_refused_and_the_model_left_alone(mix: Mixed, why: str, folder: Path) -> None:
    model = tiny_model("bert")
    before = set(model.state_dict())
    with pytest.raises(UserError, match=why):
        deltatune.attach(model, mix)
    assert set(model.state_dict()) == before
    assert not adapted_layers(model)
    with pytest.raises(UserError, match=why):
        count(find_base(str(folder)), mix, ("0", "1"))


def test_a_refused_mix_leaves_the_other_adapters_standing() -> None:
    model = shaken(deltatune.attach(tiny_model("bert"), LoRA(rank=2), name="first"))
    before = logits(model)
    for mix in (Mixed(DoRA(rank=2), IA3()), Mixed(LoRA(rank=2), Norms())):
        with pytest.raises(UserError):
            deltatune.attach(model, mix, name="second")
    assert model.attachment.name == "first"
    assert torch.equal(logits(model), before)


def test_words_become_mixes_and_a_plus_within_a_value_stays_there() -> None:
    assert parse("lora:rank=8+norms") == ("lora+norms", {"lora": {"rank": 8}})
    assert parse("lora:targets=.*q+,rank=2+bitfit:biases=up") == (
        "lora+bitfit", {"lora": {"targets": ".*q+", "rank": 2}, "bitfit": {"biases": "up"}},
    )  # fmt: skip
    assert make("lora+norms", {"lora.rank": 3}) == make("lora+norms", {"lora": {"rank": 3}})
    assert make("lora+norms", options_of(Mixed(LoRA(rank=3), Norms()))) == Mixed(LoRA(rank=3), Norms())
    with pytest.raises(UserError, match=r"no lora\+norms option named 'rank'") as caught:
        make("lora+norms", {"rank": 3})
    assert "lora.rank" in caught.value.hint
    with pytest.raises(UserError, match="no lora option named 'rnk'"):
        make("lora+norms", {"lora": {"rnk": 3}})


def test_an_experiment_writes_a_mix_as_its_words() -> None:
    choice = MethodChoice.model_validate("lora:rank=4,learning_rate=0.01+norms")
    assert (choice.method, choice.learning_rate) == ("lora+norms", 0.01)
    assert choice.label == "lora+norms (lora.rank=4, learning_rate=0.01)"
    assert choice.make() == Mixed(LoRA(rank=4), Norms())
    assert MethodChoice.model_validate(choice.model_dump(mode="json")) == choice


def test_the_command_line_counts_and_describes_a_mix(folder: Path) -> None:
    counted = command("methods", "lora:rank=2+norms", "--base", folder)
    assert counted.code == 0, counted.err
    assert "lora+norms" in counted.out
    assert "DELTATUNE_MIXED" in counted.out
    described = command("methods", "lora+bitfit")
    assert "lora.rank" in described.out
    assert "bitfit.biases" in described.out


def test_full_and_head_are_told_from_mixes_by_type() -> None:
    for part in (Full(), Head(), Mixed(LoRA(), Norms())):
        with pytest.raises(UserError, match="goes with nothing else"):
            Mixed(DoRA(), part)
    with pytest.raises(UserError, match="two methods at least"):
        Mixed(LoRA())
