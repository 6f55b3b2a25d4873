"""A combined adapter adds what the rule says to every weight, held against dense matrices in float64."""

from collections.abc import Callable, Mapping
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import deltatune
from conformance.cases import bits, shaken
from deltatune import Full, LoRA
from deltatune.errors import UserError
from deltatune.files import read_json
from deltatune.models.adapters import CONFIG
from deltatune.models.attach import adapted_layers, attachment, attachments, trainable_parameters
from tiny import tiny_inputs, tiny_model

ADAPTERS = {
    "a": LoRA(rank=2, alpha=4.0, targets="attention"),
    "b": LoRA(rank=4, alpha=2.0, targets="all-linear", rank_pattern={"mlp": 8}, alpha_pattern={"mlp": 16.0}),
    "c": LoRA(rank=3, alpha=5.0, rslora=True, targets=("mlp", "embeddings")),
}
WEIGHTS = {"a": 0.5, "b": -0.25, "c": 0.7}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]
on_three_models = pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(**tiny_inputs()).logits


def several(architecture: str, adapters: Mapping[str, LoRA] = ADAPTERS) -> PreTrainedModel:
    """The base with these adapters, each as if it had been trained."""
    model = tiny_model(architecture)
    for seed, (name, method) in enumerate(adapters.items()):
        shaken(deltatune.attach(model, method, name=name), seed)
    return model


def deltas(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    """ΔW of an adapter on each layer that it adapts, in float64."""
    layers = adapted_layers(model)
    return {
        path: method.scale
        * layers[path].deltas[name].B.detach().double()
        @ layers[path].deltas[name].A.detach().double()
        for path, method in attachments(model)[name].modules.items()
    }


def weighted_sum(model: PreTrainedModel, weights: Mapping[str, float]) -> dict[str, Tensor]:
    summed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for path, delta in deltas(model, name).items():
            summed[path] = summed.get(path, 0) + weight * delta
    return summed


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The relative distance of the first from the second over all layers."""
    assert one.keys() == other.keys()
    apart = sum((one[path] - other[path]).square().sum() for path in one)
    return (apart / sum(delta.square().sum() for delta in other.values())).sqrt().item()


@on_three_models
def test_linear_is_the_weighted_sum(architecture: str) -> None:
    model = several(architecture)
    done = deltatune.combine(model, WEIGHTS, name="both")
    assert distance(deltas(model, "both"), weighted_sum(model, WEIGHTS)) < 1e-7, "but for the rounding of B to fp32"
    powers_of_two = {"a": 0.5, "b": -0.25}
    deltatune.combine(model, powers_of_two, name="exact")
    assert distance(deltas(model, "exact"), weighted_sum(model, powers_of_two)) < 1e-15
    assert done.error == 0
    assert done.errors.keys() == deltas(model, "both").keys()
    assert set(done.errors.values()) == {0.0}


@on_three_models
def test_the_model_computes_with_the_base_s_weights_plus_the_sum(architecture: str) -> None:
    model = several(architecture)
    summed = weighted_sum(model, WEIGHTS)
    deltatune.combine(model, WEIGHTS, name="both")
    plain = tiny_model(architecture)
    with torch.no_grad():
        for path, delta in summed.items():
            layer = plain.get_submodule(path)
            same_way = tuple(layer.weight.shape) == tuple(delta.shape) and isinstance(layer, torch.nn.Linear)
            layer.weight += delta if same_way else delta.T
        for name in trainable_parameters(model).keys() & dict(plain.named_parameters()).keys():
            plain.get_parameter(name).copy_(model.get_parameter(name))  # the head
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-4, rtol=1e-4)


def test_the_ranks_add_up_as_far_as_a_weight_can_use_them() -> None:
    wide = {"a": LoRA(rank=20, targets="query"), "b": LoRA(rank=20, targets=("query", "key"))}
    model = several("bert", wide)
    done = deltatune.combine(model, {"a": 1.0, "b": 1.0}, name="both")
    ranks = {path: method.rank for path, method in attachments(model)["both"].modules.items()}
    assert {path.rpartition(".")[2]: rank for path, rank in ranks.items()} == {"query": 32, "key": 20}
    assert done.error == 0
    assert distance(deltas(model, "both"), weighted_sum(model, {"a": 1.0, "b": 1.0})) < 1e-6


@pytest.mark.parametrize("rank", [1, 3, 6])
@on_three_models
def test_svd_is_off_by_the_singular_values_that_it_leaves_out(architecture: str, rank: int) -> None:
    model = several(architecture)
    done = deltatune.combine(model, WEIGHTS, name="both", how="svd", rank=rank)
    exact, made = weighted_sum(model, WEIGHTS), deltas(model, "both")
    assert max(method.rank for method in attachments(model)["both"].modules.values()) == rank
    for path, delta in exact.items():
        s = torch.linalg.svdvals(delta)
        assert done.errors[path] == pytest.approx((s[rank:].norm() / s.norm()).item(), abs=1e-9)
    assert done.error == pytest.approx(distance(made, exact), rel=1e-5, abs=1e-6)
    assert done.error > 0.1


def test_svd_of_full_rank_is_exact_and_without_a_rank_has_the_largest_of_the_adapters() -> None:
    model = several("bert")
    full = deltatune.combine(model, WEIGHTS, name="full", how="svd", rank=15)
    assert full.error < 1e-12
    assert distance(deltas(model, "full"), weighted_sum(model, WEIGHTS)) < 1e-6
    assert deltatune.combine(model, WEIGHTS, name="left-out", how="svd").method.rank == 8


def naive_ties(given: list[tuple[float, Tensor]], density: float) -> Tensor:
    """Algorithm 1 of TIES, entry by entry; with weights, each mean is weighted and λ is their sum."""
    trimmed = []
    for weight, delta in given:
        order = sorted(range(delta.numel()), key=lambda place: -abs(delta.flatten()[place].item()))
        kept = set(order[: round(density * delta.numel())])
        trimmed.append((weight, [x if n in kept else 0.0 for n, x in enumerate(delta.flatten().tolist())]))
    merged = []
    for n in range(given[0][1].numel()):
        entries = [(weight, values[n]) for weight, values in trimmed]
        positive = sum(weight * value for weight, value in entries) > 0
        agreeing = [(weight, value) for weight, value in entries if value and (value > 0) == positive]
        mean = sum(w * v for w, v in agreeing) / sum(w for w, _ in agreeing) if agreeing else 0.0
        merged.append(sum(weight for weight, _ in given) * mean)
    return torch.tensor(merged, dtype=torch.float64).view_as(given[0][1])


THREE = {name: LoRA(rank=rank, targets="query") for name, rank in (("a", 2), ("b", 3), ("c", 4))}
THIRDS = {"a": 0.5, "b": 0.3, "c": 0.4}


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_trims_elects_and_takes_the_mean_of_those_that_agree(density: float) -> None:
    model = several("bert", THREE)
    each = {name: deltas(model, name) for name in THREE}
    exact = {path: naive_ties([(THIRDS[n], each[n][path]) for n in THREE], density) for path in each["a"]}
    full = deltatune.combine(model, THIRDS, name="full", how="ties", density=density, rank=32)
    assert full.error < 1e-12
    assert distance(deltas(model, "full"), exact) < 1e-6
    small = deltatune.combine(model, THIRDS, name="small", how="ties", density=density, rank=4)
    assert small.error == pytest.approx(distance(deltas(model, "small"), exact), rel=1e-5)
    for path, delta in exact.items():
        s = torch.linalg.svdvals(delta)
        assert small.errors[path] == pytest.approx((s[4:].norm() / s.norm()).item(), rel=1e-6)


def test_ties_counts_an_adapter_only_where_it_has_something_to_say() -> None:
    model = several("bert", {"a": LoRA(rank=2, targets="query"), "b": LoRA(rank=2, targets="key")})
    deltatune.combine(model, {"a": 0.5, "b": 0.5}, name="both", how="ties", density=1.0)
    assert distance(deltas(model, "both"), deltas(model, "a") | deltas(model, "b")) < 1e-6


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_dare_drops_at_random_and_rescales(density: float) -> None:
    model = several("bert", THREE)
    generator = torch.Generator().manual_seed(5)
    exact = {path: torch.zeros(32, 32, dtype=torch.float64) for path in deltas(model, "a")}
    for path in exact:
        for name, weight in THIRDS.items():
            kept = torch.rand(32, 32, generator=generator) < density
            exact[path] += weight * torch.where(kept, deltas(model, name)[path], 0.0) / density
    full = deltatune.combine(model, THIRDS, name="full", how="dare", density=density, rank=32, seed=5)
    assert full.error < 1e-12
    assert distance(deltas(model, "full"), exact) < 1e-6
    small = deltatune.combine(model, THIRDS, name="small", how="dare", density=density, rank=4, seed=5)
    assert small.error == pytest.approx(distance(deltas(model, "small"), exact), rel=1e-5)
    if density == 1:
        assert distance(deltas(model, "full"), weighted_sum(model, THIRDS)) < 1e-6, "nothing is dropped"
    else:
        deltatune.combine(model, THIRDS, name="other", how="dare", density=density, rank=32, seed=6)
        assert distance(deltas(model, "other"), exact) > 0.1, "another seed drops others"


@pytest.mark.parametrize("how", ["linear", "svd", "ties", "dare"])
@on_three_models
def test_a_combined_adapter_is_plain_lora_to_peft_and_here(architecture: str, how: str, tmp_path: Path) -> None:
    weights = {name: abs(weight) for name, weight in WEIGHTS.items()}
    model = several(architecture)
    deltatune.combine(model, weights, name="both", how=how)
    deltatune.save_adapter(model, tmp_path / "adapter", base="tiny")
    theirs = peft.PeftModel.from_pretrained(tiny_model(architecture), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-4, rtol=1e-4)
    loaded = deltatune.load_adapter(tiny_model(architecture), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    config = read_json(tmp_path / "adapter" / CONFIG)
    assert config["r"] == config["lora_alpha"], "where no pattern is read, every scale is 1 all the same"
    assert config["rank_pattern"] == config["alpha_pattern"]


def test_the_new_one_is_active_has_the_mean_head_and_leaves_the_others_as_they_are() -> None:
    model = several("bert")
    outputs, heads = {}, {}
    for name in ADAPTERS:
        outputs[name] = logits(deltatune.activate(model, name))
        heads[name] = model.classifier.weight.detach().clone()
    deltatune.combine(model, WEIGHTS, name="both")
    active = attachment(model)
    assert active is not None
    assert active.name == "both"
    mean = sum(weight * heads[name] for name, weight in WEIGHTS.items()) / sum(WEIGHTS.values())
    torch.testing.assert_close(model.classifier.weight.detach(), mean)
    for name, output in outputs.items():
        assert torch.equal(logits(deltatune.activate(model, name)), output)


def test_one_adapter_can_be_made_smaller_and_a_combined_one_combined_again() -> None:
    model = several("bert")
    deltatune.combine(model, {"b": 1.0}, name="smaller", how="svd", rank=2)
    assert attachments(model)["smaller"].method.rank == 2
    deltatune.combine(model, {"a": 1.0, "smaller": 2.0}, name="again")
    exact = weighted_sum(model, {"a": 1.0, "smaller": 2.0})
    assert distance(deltas(model, "again"), exact) < 1e-7


def test_adapters_that_add_nothing_combine_to_one_that_adds_nothing() -> None:
    model = tiny_model("bert")
    deltatune.attach(deltatune.attach(model, LoRA(rank=2), name="a"), LoRA(rank=3), name="b")
    for how in ("linear", "svd", "ties", "dare"):
        done = deltatune.combine(model, {"a": 0.5, "b": 0.5}, name=how, how=how)
        assert done.error == 0
        assert torch.equal(logits(model), logits(tiny_model("bert")))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"weights": {}}, "nothing to combine"),
        ({"weights": {"a": 1.0, "d": 1.0}}, "no adapter named 'd'"),
        ({"weights": {"a": 1.0, "b": float("nan")}}, "weight of 'b' is nan"),
        ({"weights": {"a": 0.0, "b": 1.0}}, "weight of 'a' is 0"),
        ({"weights": {"a": 1.0, "b": -1.0}}, "weights sum to 0"),
        ({"weights": {"a": 1.0, "b": -0.5}, "how": "ties"}, "which ties has no meaning for"),
        ({"weights": {"a": 1.0, "b": -0.5}, "how": "dare"}, "which dare has no meaning for"),
        ({"how": "slerp"}, "no way of combining named 'slerp'"),
        ({"rank": 4}, "rank is the sum of the ranks"),
        ({"how": "svd", "rank": 0}, "rank must be at least 1"),
        ({"density": 0.5}, "linear keeps every entry"),
        ({"how": "svd", "density": 0.5}, "svd keeps every entry"),
        ({"how": "ties", "density": 0.0}, "density must be above 0"),
        ({"how": "dare", "density": 1.1}, "density must be above 0 and at most 1"),
        ({"name": "a"}, "'a' is attached already"),
        ({"name": "a b"}, "cannot be an adapter's name"),
        ({"weights": {"a": 1.0, "biased": 1.0}}, "'biased' trains biases"),
        ({"weights": {"a": 1.0, "headless": 1.0}}, "'a' and 'headless' have different heads"),
        ({"weights": {"a": 1.0, "broken": 1.0}}, "'broken' has values that are not finite"),
    ],
)
def test_what_cannot_be_combined_is_refused_and_changes_nothing(arguments: dict, why: str) -> None:
    model = several("bert")
    deltatune.attach(model, LoRA(rank=2, bias="adapted"), name="biased")
    deltatune.attach(model, LoRA(rank=2, targets="attention"), name="headless", head=())
    shaken(deltatune.attach(model, LoRA(rank=2), name="broken"))
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.deltas["broken"].A[0, 0] = torch.inf
    deltatune.activate(model, "a")
    before, output = bits(model), logits(model)
    with pytest.raises(UserError, match=why):
        deltatune.combine(model, **{"weights": {"a": 0.5, "b": 0.5}, "name": "both", **arguments})
    assert bits(model).keys() == before.keys()
    assert torch.equal(logits(model), output)


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (lambda model: deltatune.attach(model, Full(), name="a"), "full adapter, and only LoRA's"),
        (lambda model: deltatune.merge(shaken(deltatune.attach(model, LoRA(rank=2), name="a"))), "merged"),
    ],
)
def test_methods_without_thin_factors_and_merged_ones_are_refused(prepare: Callable, why: str) -> None:
    model = tiny_model("bert")
    prepare(model)
    with pytest.raises(UserError, match=why):
        deltatune.combine(model, {"a": 1.0}, name="both")
