"""Several adapters on one model: each is what it would be alone, and the base is what it was."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import deltatune
from conformance.cases import bits, shaken
from deltatune import Full, Head, LoRA
from deltatune.errors import UserError
from deltatune.methods import Method
from deltatune.models.adapters import TENSORS
from deltatune.models.attach import adapted_layers, attachments, trainable_parameters
from tiny import tiny_inputs, tiny_model

A = LoRA(rank=2, targets="attention")
B = LoRA(rank=3, targets="all-linear", rank_pattern={"mlp": 5})
on_three_models = pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs()).logits


def alone(architecture: str, method: Method, seed: int) -> PreTrainedModel:
    """The base with this adapter, as if it had been trained."""
    return shaken(deltatune.attach(tiny_model(architecture), method), seed)


def two(architecture: str) -> PreTrainedModel:
    """The base with the adapters a and b, each as if it had been trained; b is active."""
    model = shaken(deltatune.attach(tiny_model(architecture), A, name="a"), seed=1)
    return shaken(deltatune.attach(model, B, name="b"), seed=2)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def deltas(model: PreTrainedModel, name: str) -> dict[str, torch.Tensor]:
    """A copy of everything that was added under a name."""
    return {key: value for key, value in bits(model).items() if f".deltas.{name}." in key}


@on_three_models
def test_each_adapter_gives_its_own_logits_in_whatever_order_they_are_activated(architecture: str) -> None:
    model = two(architecture)
    wanted = {
        "a": logits(alone(architecture, A, seed=1)),
        "b": logits(alone(architecture, B, seed=2)),
        None: logits(tiny_model(architecture)),
    }
    assert not torch.equal(wanted["a"], wanted["b"])
    for name in ("b", "a", "b", None, "a", "a", None, None, "b", "a"):
        assert torch.equal(logits(deltatune.activate(model, name)), wanted[name])


@on_three_models
def test_no_adapter_disabled_ones_and_the_untrained_head_are_the_base(architecture: str) -> None:
    model, base = two(architecture), tiny_model(architecture)
    trained_head = {n: p.detach().clone() for n, p in trainable_parameters(model).items() if ".deltas." not in n}
    with deltatune.disabled(model):
        disabled = logits(model)
    deltatune.activate(model, None)
    assert all(torch.equal(model.get_parameter(name), base.get_parameter(name)) for name in trained_head)
    assert torch.equal(logits(model), logits(base))
    with torch.no_grad():
        for name, value in trained_head.items():
            base.get_parameter(name).copy_(value)
    assert torch.equal(disabled, logits(base)), "disabling leaves the trained head"
    assert not trainable_parameters(model)


@on_three_models
def test_deleting_one_leaves_the_other_as_it_is(architecture: str, tmp_path: Path) -> None:
    for gone, left in (("a", "b"), ("b", "a")):
        model = deltatune.activate(two(architecture), left)
        output = logits(model)
        deltatune.save_adapter(model, tmp_path / "before", base="tiny")
        deltatune.detach(model, gone)
        assert torch.equal(logits(model), output)
        deltatune.save_adapter(model, tmp_path / "after", base="tiny")
        for file in (tmp_path / "before").iterdir():
            assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes()
        assert not deltas(model, gone)
    assert all(".attention." in path or ".attn." in path or "self_attn" in path for path in adapted_layers(model))


@on_three_models
def test_deleting_the_last_leaves_the_very_same_base(architecture: str) -> None:
    base = tiny_model(architecture)
    modules = {path: type(module) for path, module in base.named_modules()}
    attributes = set(vars(base))
    for order in (("a", "b"), ("b", "a")):
        model = two(architecture)
        for name in order:
            deltatune.detach(model, name)
        assert {path: type(module) for path, module in model.named_modules()} == modules
        assert same(bits(model), bits(base))
        assert set(vars(model)) == attributes
        assert all(parameter.requires_grad for parameter in model.parameters())


@on_three_models
def test_the_active_one_trains_and_the_other_keeps_its_bits(architecture: str) -> None:
    model = two(architecture)
    for active, resting in (("a", "b"), ("b", "a")):
        deltatune.activate(model, resting)
        output, before = logits(model), bits(model)
        model.train()(**tiny_inputs(), labels=torch.tensor([0, 1, 2])).loss.backward()
        deltatune.activate(model.eval(), active)
        own = {name for name in trainable_parameters(model) if ".deltas." in name}
        assert own == deltas(model, active).keys()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)  # of everything: what does not train must not move
        model.train()(**tiny_inputs(), labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
        after = bits(model.eval())
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert own <= moved <= trainable_parameters(model).keys()
        assert torch.equal(logits(deltatune.activate(model, resting)), output)


@on_three_models
def test_saving_writes_what_the_active_one_alone_would_write(architecture: str, tmp_path: Path) -> None:
    model = two(architecture)
    for name, method, seed in (("a", A, 1), ("b", B, 2)):
        deltatune.save_adapter(deltatune.activate(model, name), tmp_path / "beside", base="tiny")
        deltatune.save_adapter(alone(architecture, method, seed), tmp_path / "alone", base="tiny")
        for file in (tmp_path / "alone").iterdir():
            assert file.read_bytes() == (tmp_path / "beside" / file.name).read_bytes()
    with pytest.raises(UserError, match="nothing is attached"):
        deltatune.save_adapter(deltatune.activate(model, None), tmp_path / "none")


@on_three_models
def test_two_files_load_under_two_names(architecture: str, tmp_path: Path) -> None:
    outputs = {}
    for name, method, seed in (("a", A, 1), ("b", B, 2)):
        trained = alone(architecture, method, seed)
        deltatune.save_adapter(trained, tmp_path / name)
        outputs[name] = logits(trained)
    model = tiny_model(architecture)
    for name in outputs:
        deltatune.load_adapter(model, tmp_path / name, name=name)
    assert list(attachments(model)) == ["a", "b"]
    for name, output in outputs.items():
        assert torch.equal(logits(deltatune.activate(model, name)), output)


def test_a_file_that_does_not_fit_leaves_the_adapters_that_stand_here(tmp_path: Path) -> None:
    deltatune.save_adapter(deltatune.attach(tiny_model("bert", seed=1), A), tmp_path / "other")
    model = two("bert")
    before, output = bits(model), logits(model)
    with pytest.raises(UserError, match="another base"):
        deltatune.load_adapter(model, tmp_path / "other", name="other")
    assert same(bits(model), before)
    assert torch.equal(logits(model), output)
    assert list(attachments(model)) == ["a", "b"]
    assert any(".deltas.b." in name for name in trainable_parameters(model))
    plain = tiny_model("bert")
    with pytest.raises(UserError, match="another base"):
        deltatune.load_adapter(plain, tmp_path / "other")
    assert same(bits(plain), bits(tiny_model("bert")))


@pytest.mark.parametrize(
    ("act", "why"),
    [
        (lambda model: deltatune.attach(model, A, name="a"), "'a' is attached already"),
        (lambda model: deltatune.attach(model, A, name="a.b"), "'a.b' cannot be an adapter's name"),
        (lambda model: deltatune.attach(model, A, name=""), "'' cannot be an adapter's name"),
        (lambda model: deltatune.activate(model, "c"), "there is no adapter named 'c'"),
        (lambda model: deltatune.activate(model, ""), "there is no adapter named ''"),
        (lambda model: deltatune.detach(model), "there is no adapter named 'default'"),
        (lambda model: deltatune.attach(model, Full(), name="c"), "full trains the base's own parameters"),
        (lambda model: deltatune.attach(model, Head(), name="c"), "head trains the base's own parameters"),
        (lambda model: deltatune.attach(model, LoRA(targets="qurey"), name="c"), "'qurey' matches no layer"),
        (
            lambda model: deltatune.attach(model, LoRA(rank=2, targets="classifier"), name="c", head=()),
            "in the head of 'a'",
        ),
        (lambda model: deltatune.attach(model, A, name="c", head=("bert.pooler",)), "'b' adapts bert.pooler.dense"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(act: Callable, why: str) -> None:
    model = two("bert")
    before, output, trains = bits(model), logits(model), trainable_parameters(model).keys()
    with pytest.raises(UserError, match=why):
        act(model)
    assert same(bits(model), before)
    assert torch.equal(logits(model), output)
    assert (trainable_parameters(model).keys(), [*attachments(model)]) == (trains, ["a", "b"])


@pytest.mark.parametrize("method", [Full(), Head()], ids=["full", "head"])
def test_nothing_stands_beside_a_method_that_trains_the_base(method: Method) -> None:
    model = deltatune.attach(tiny_model("bert"), method)
    for act in (
        lambda: deltatune.attach(model, A, name="a"),
        lambda: deltatune.activate(model, None),
        lambda: deltatune.detach(model),
    ):
        with pytest.raises(UserError, match="base's own parameters"):
            act()
    assert trainable_parameters(model)


def test_while_one_is_merged_none_is_switched_added_deleted_or_disabled() -> None:
    model = two("bert")
    output = logits(model)
    deltatune.merge(model)
    for act in (
        lambda: deltatune.activate(model, "a"),
        lambda: deltatune.activate(model, None),
        lambda: deltatune.attach(model, A, name="c"),
        lambda: deltatune.detach(model, "a"),
        lambda: deltatune.disabled(model).__enter__(),
    ):
        with pytest.raises(UserError, match="merged"):
            act()
    deltatune.unmerge(model)
    assert torch.equal(logits(model), output)
    assert torch.equal(logits(deltatune.activate(model, None)), logits(tiny_model("bert")))


@on_three_models
def test_merging_and_unmerging_is_of_the_active_one(architecture: str) -> None:
    model = two(architecture)
    before = bits(deltatune.activate(model, "a"))
    output = logits(model)
    assert deltatune.merge(model).layers == len(attachments(model)["a"].modules) < len(adapted_layers(model))
    torch.testing.assert_close(logits(model), output, atol=1e-4, rtol=1e-4)
    deltatune.unmerge(model)
    assert same(bits(model), before)
    folded = deltatune.fold(model)
    assert bits(folded).keys() == bits(tiny_model(architecture)).keys()
    torch.testing.assert_close(logits(folded), output, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(deltatune.attach(folded, A)), logits(folded)), (
        "what was folded is a base like any other, and training starts there"
    )


@on_three_models
def test_a_copy_has_both_and_is_independent(architecture: str) -> None:
    model = two(architecture)
    twin = copy.deepcopy(model)
    outputs = {name: logits(deltatune.activate(model, name)) for name in ("a", None, "b")}
    shaken(deltatune.activate(twin, "a"), seed=5)
    deltatune.detach(twin, "b")
    for name, output in outputs.items():
        assert torch.equal(logits(deltatune.activate(model, name)), output)
    assert not torch.equal(logits(twin), outputs["a"])
    assert torch.equal(logits(deltatune.activate(twin, None)), outputs[None])


def test_adapters_over_different_layers_do_not_meet() -> None:
    model = shaken(deltatune.attach(tiny_model("bert"), LoRA(rank=2, targets="query"), name="a"), seed=1)
    shaken(deltatune.attach(model, LoRA(rank=2, targets="mlp"), name="b"), seed=2)
    layers = adapted_layers(model)
    assert {tuple(layer.deltas) for path, layer in layers.items() if path.endswith("query")} == {("a",)}
    assert {tuple(layer.deltas) for path, layer in layers.items() if not path.endswith("query")} == {("b",)}
    for name, method, seed in (("a", LoRA(rank=2, targets="query"), 1), ("b", LoRA(rank=2, targets="mlp"), 2)):
        assert torch.equal(logits(deltatune.activate(model, name)), logits(alone("bert", method, seed)))


@pytest.mark.parametrize("first", [("classifier",), ()], ids=["head first", "no head first"])
def test_adapters_may_have_different_heads(first: tuple[str, ...], tmp_path: Path) -> None:
    heads = {"a": first, "b": ("classifier", "bert.pooler")}
    outputs = {}
    for seed, (name, head) in enumerate(heads.items()):
        trained = shaken(deltatune.attach(tiny_model("bert"), A, head=head), seed)
        deltatune.save_adapter(trained, tmp_path / name)
        outputs[name] = logits(trained)
    model = tiny_model("bert")
    for name in heads:
        deltatune.load_adapter(model, tmp_path / name, name=name)
    for name in ("a", "b", "a"):
        assert torch.equal(logits(deltatune.activate(model, name)), outputs[name])
        deltatune.save_adapter(model, tmp_path / "again")
        assert (tmp_path / "again" / TENSORS).read_bytes() == (tmp_path / name / TENSORS).read_bytes()
    assert torch.equal(logits(deltatune.activate(model, None)), logits(tiny_model("bert")))
