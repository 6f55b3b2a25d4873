"""Where LoRA begins: each initialisation against its paper, the base untouched, the file that of a plain LoRA."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import deltatune
from conformance.cases import adapted, bits, shaken
from deltatune import LoRA, UserError
from deltatune.files import read_json
from deltatune.methods import Site
from deltatune.methods.lora_init import InputDirections, largest_components, spread_ranks
from deltatune.models.adapters import CONFIG
from deltatune.models.attach import adapted_layers
from tiny import tiny_inputs, tiny_model

MOVING = ("pissa", "olora", "lora-ga")
ALL = ("gaussian", "orthogonal", *MOVING, "eva")


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs()).logits


def batches(count: int = 3) -> Iterator[dict[str, torch.Tensor]]:
    for seed in range(count):
        yield {**tiny_inputs(seed), "labels": torch.tensor([0, 1, 2])}


def attached(architecture: str, method: LoRA) -> nn.Module:
    return deltatune.attach(tiny_model(architecture), method, examples=batches())


@pytest.mark.parametrize("init", ALL)
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "t5"])
def test_training_starts_at_the_base_which_keeps_its_bits(init: str, architecture: str) -> None:
    base = tiny_model(architecture)
    model = attached(architecture, LoRA(rank=2, init=init)).eval()
    torch.testing.assert_close(logits(model), logits(base))
    after = {name.replace(".base.", "."): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in bits(base).items())
    assert not any(layer.delta.A.isnan().any() for layer in adapted_layers(model).values())


@pytest.mark.parametrize("init", [*MOVING, "eva"])
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
def test_a_file_is_a_plain_lora_here_and_in_peft(init: str, architecture: str, rslora: bool, tmp_path: Path) -> None:
    method = LoRA(
        rank=2, init=init, rslora=rslora, rank_pattern={"mlp": 3, "attention": 2}, alpha_pattern={"attention": 3.0}
    )
    model = attached(architecture, method)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.delta.A.add_(0.1 * torch.randn_like(layer.delta.A))
            layer.delta.B.add_(0.1 * torch.randn_like(layer.delta.B))
    assert not torch.allclose(logits(model), logits(tiny_model(architecture)))
    deltatune.save_adapter(model, tmp_path)
    assert read_json(tmp_path / CONFIG)["init_lora_weights"] is True
    assert read_json(tmp_path / "deltatune.json")["trained as"]["init"] == init
    loaded = deltatune.load_adapter(tiny_model(architecture), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model))
    theirs = peft.PeftModel.from_pretrained(tiny_model(architecture), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=2e-5, rtol=1e-5)
    if rslora is False:
        deltatune.merge(model)
        torch.testing.assert_close(logits(model), logits(loaded), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("init", MOVING)
def test_the_portable_form_has_twice_the_rank_at_the_same_scale(init: str) -> None:
    for method in (
        LoRA(rank=3, init=init),
        LoRA(rank=3, init=init, rslora=True),
        LoRA(rank=3, alpha=5.0, init=init),
        LoRA(rank=3, alpha=5.0, init=init, rslora=True),
    ):
        portable = method.portable()
        assert (portable.rank, portable.init) == (6, "kaiming")
        assert math.isclose(portable.scale, method.scale)
        site = Site(20, 12)
        assert method.stored_parameters([site]) == portable.parameters(site) == 2 * method.parameters(site)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("options", [{}, {"alpha": 3.0, "rslora": True}])
def test_pissa_trains_the_principal_components_of_the_weight(rank: int, options: dict) -> None:
    """W − s·B₀·A₀ is what is left of W without its largest singular values (arXiv 2404.02948, equations 2 to 4)."""
    layer = adapted(LoRA(rank=rank, init="pissa", **options), "linear")
    delta, sizes = layer.delta, torch.linalg.svdvals(layer.weight)
    left = torch.linalg.svdvals(layer.weight - delta.scale * delta.B @ delta.A)
    torch.testing.assert_close(left[: 12 - rank], sizes[rank:])
    torch.testing.assert_close(delta.A.norm(dim=1), (sizes[:rank] / delta.scale).sqrt())
    torch.testing.assert_close(delta.B.norm(dim=0), delta.A.norm(dim=1))


def test_olora_trains_the_first_columns_and_rows_of_a_qr_decomposition() -> None:
    layer = adapted(LoRA(rank=3, init="olora"), "linear")
    Q, R = torch.linalg.qr(layer.weight)
    torch.testing.assert_close(layer.delta.B.detach(), Q[:, :3])
    torch.testing.assert_close(layer.delta.A.detach(), R[:3])


def test_orthogonal_begins_with_two_matrices_whose_product_is_zero() -> None:
    delta = adapted(LoRA(rank=4, init="orthogonal"), "linear").delta
    assert delta.A.norm() > 0.1
    assert delta.B.norm() > 0.1
    torch.testing.assert_close(delta.B @ delta.A, torch.zeros(20, 12), atol=1e-7, rtol=0)
    assert torch.linalg.matrix_rank(delta.A) == 2


def test_gaussian_has_the_deviation_of_peft() -> None:
    layer = nn.Sequential(nn.Linear(3000, 40))
    delta = deltatune.attach(layer, LoRA(rank=4, init="gaussian", targets="0"))[0].delta
    assert math.isclose(delta.A.std().item(), 1 / 4, rel_tol=0.05)
    assert not delta.B.any()


def test_training_from_a_moved_start_changes_the_weight_by_what_was_learnt_alone() -> None:
    layer = adapted(LoRA(rank=2, init="pissa"), "linear").train()
    delta, before = layer.delta, (layer.delta.B @ layer.delta.A).detach()
    torch.optim.SGD(delta.parameters(), lr=0.1).zero_grad()
    layer(torch.randn(5, 12)).square().mean().backward()
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter -= 0.1 * parameter.grad
    change = delta.merged(layer.weight) - layer.weight
    torch.testing.assert_close(change, delta.scale * (delta.B @ delta.A - before), atol=1e-6, rtol=1e-4)


def test_a_small_step_from_a_large_start_is_not_lost_in_16_bits() -> None:
    layer = adapted(LoRA(rank=4, init="pissa"), "linear-bf16")
    x = torch.randn(32, 12).bfloat16()
    assert torch.equal(layer(x), layer.base(x)), "the start is the base to the bit"
    with torch.no_grad():
        layer.delta.B.mul_(1 + 2**-12)  # bf16 has no number between 1 and 1 + 2⁻⁷
        layer.weight.zero_()
        layer.bias.zero_()
    expected = x.float() @ (layer.delta.scale * 2**-12 * layer.delta.B0 @ layer.delta.A).T
    assert (layer(x).float() - expected).norm() < 0.02 * expected.norm()


class Layer(nn.Module):
    """One linear layer that is called as Transformers' models are; its loss is the mean squared output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 20)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None):
        y = self.linear(x)
        return type("Output", (), {"loss": y.square().mean()})


def test_eva_begins_with_the_right_singular_vectors_of_the_inputs() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(6, 30, 12) * torch.logspace(1, -1, 12)
    mask = torch.arange(30).expand(6, 30) < 25
    spoilt = inputs.masked_fill(~mask[..., None], 1e3)
    examples = [{"x": spoilt[i : i + 1], "attention_mask": mask[i : i + 1].long()} for i in range(6)]
    delta = deltatune.attach(Layer(), LoRA(rank=3, init="eva"), examples=examples).linear.delta
    _, _, Vh = torch.linalg.svd(inputs[mask], full_matrices=False)
    cosines = (delta.A.detach() * Vh[:3]).sum(1).abs()
    assert (cosines > 0.99).all(), "padding is left out"
    assert not delta.B.any()


def test_eva_stops_reading_when_the_directions_stand_still() -> None:
    torch.manual_seed(0)
    read = []

    def examples() -> Iterator[dict[str, torch.Tensor]]:
        for index in range(50):
            read.append(index)
            yield {"x": torch.randn(4, 30, 12) * torch.logspace(1, -1, 12)}

    deltatune.attach(Layer(), LoRA(rank=2, init="eva"), examples=examples())
    assert 2 <= len(read) < 50


def test_eva_deals_the_ranks_by_explained_variance_and_keeps_their_sum_and_scale() -> None:
    method = LoRA(rank=4, alpha=12.0, init="eva")
    layers = adapted_layers(attached("bert", method))
    ranks = [layer.delta.A.shape[0] for layer in layers.values()]
    assert sum(ranks) == 4 * len(ranks)
    assert len(set(ranks)) > 1
    assert min(ranks) >= 1
    assert max(ranks) <= 8
    assert {layer.delta.scale for layer in layers.values()} == {3.0}


def test_what_explains_most_gets_the_most_ranks() -> None:
    site = Site(20, 12)
    flat, steep = InputDirections(2, site), InputDirections(2, site)
    flat.see(torch.eye(12))
    steep.see(torch.diag(torch.tensor([9.0, 0.1, 0.1, 0.1] + [0.01] * 8)))
    assert spread_ranks({"flat": 2, "steep": 2}, {"flat": flat, "steep": steep}) == {"flat": 3, "steep": 1}


def test_directions_found_batch_by_batch_are_those_of_all_batches_together() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(400, 12) * torch.logspace(1, -1, 12)
    observer = InputDirections(6, Site(20, 12))
    for batch in inputs.split(50):
        observer.see(batch)
    _, S, Vh = torch.linalg.svd(inputs, full_matrices=False)
    torch.testing.assert_close((observer.directions * Vh).sum(1).abs(), torch.ones(12))
    torch.testing.assert_close(torch.tensor(observer.explained), S.square() / S.square().sum())


def test_lora_ga_spans_the_largest_components_of_the_gradient() -> None:
    """A from the first r right singular vectors, B from the next r left ones, of size d_out^¼ / √γ (2407.05000)."""
    torch.manual_seed(0)
    model, x = Layer(), torch.randn(3, 30, 12) * torch.logspace(1, -1, 12)
    model(x).loss.backward()
    U, _, Vh = torch.linalg.svd(model.linear.weight.grad)
    model.zero_grad()
    delta = deltatune.attach(model, LoRA(rank=3, init="lora-ga"), examples=[{"x": x}]).linear.delta
    size = 20**0.25 / 4
    torch.testing.assert_close((delta.A.detach() @ Vh[:3].T).abs(), size * torch.eye(3), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close((delta.B.detach().T @ U[:, 3:6]).abs(), size * torch.eye(3), atol=1e-4, rtol=1e-4)
    assert torch.equal(delta.A, delta.A0)
    assert torch.equal(delta.B, delta.B0)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "t5"])
def test_the_gradient_that_is_observed_is_that_of_the_weight(architecture: str) -> None:
    method = LoRA(rank=2, init="lora-ga")
    deltas = {path: layer.delta for path, layer in adapted_layers(attached(architecture, method)).items()}
    model = tiny_model(architecture)
    for batch in batches():
        model(**batch).loss.backward()
    for path, delta in deltas.items():
        layer = model.get_submodule(path)
        gradient = layer.weight.grad if isinstance(layer, nn.Linear) else layer.weight.grad.T
        _, S, Vh = torch.linalg.svd(gradient, full_matrices=False)
        if S[1] - S[2] > 1e-3 * S[0]:  # else the subspace is not determined
            inside = torch.linalg.svdvals(delta.A.detach() @ Vh[:2].T) / delta.A[0].norm()
            torch.testing.assert_close(inside, torch.ones(2), atol=1e-3, rtol=0)


def test_observing_leaves_the_model_as_it_was() -> None:
    model = deltatune.attach(tiny_model("bert").train(), LoRA(rank=2), name="first")
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.bert.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    with pytest.raises(UserError, match="input vectors"):  # it has observed, and changes nothing
        deltatune.attach(model, LoRA(rank=12, init="eva", targets="pooler.dense"), name="second", examples=batches(1))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trains
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_second_adapter_observes_the_base_and_not_the_first() -> None:
    beside = shaken(deltatune.attach(tiny_model("bert"), LoRA(rank=2), name="first"))
    deltatune.attach(beside, LoRA(rank=2, init="lora-ga"), name="second", examples=batches())
    alone = attached("bert", LoRA(rank=2, init="lora-ga"))
    for path, layer in adapted_layers(alone).items():
        torch.testing.assert_close(adapted_layers(beside)[path].delta.A, layer.delta.A)


@pytest.mark.parametrize("init", ["eva", "lora-ga"])
def test_without_examples_it_is_refused_with_what_to_do_and_the_model_left_alone(init: str) -> None:
    model = tiny_model("bert")
    for examples in ((), iter(())):
        with pytest.raises(UserError, match="examples") as caught:
            deltatune.attach(model, LoRA(rank=2, init=init), examples=examples)
        assert "examples=batches" in caught.value.hint
        assert not adapted_layers(model)


def test_lora_ga_without_labels_is_refused() -> None:
    with pytest.raises(UserError, match="loss") as caught:
        deltatune.attach(tiny_model("bert"), LoRA(rank=2, init="lora-ga"), examples=[tiny_inputs()])
    assert "labels" in caught.value.hint


@pytest.mark.parametrize("init", ALL)
def test_an_outline_without_weights_can_be_attached_to(init: str) -> None:
    model = tiny_model("bert").to("meta")
    deltatune.attach(model, LoRA(rank=2, init=init))
    assert all(layer.delta.A.is_meta for layer in adapted_layers(model).values())


def test_the_seed_decides_random_beginnings_and_a_run_gives_the_same_bits() -> None:
    for init in ALL:
        first, second = (attached("bert", LoRA(rank=2, init=init)) for _ in range(2))
        assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_the_randomised_decomposition_finds_what_the_exact_one_does() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(60, 50) @ torch.diag(torch.logspace(2, -2, 50)) @ torch.randn(50, 50)
    exact, fast = largest_components(matrix, 4), largest_components(matrix, 4, exact=10)
    torch.testing.assert_close(fast[1], exact[1], rtol=1e-4, atol=0)
    torch.testing.assert_close((fast[2] * exact[2]).sum(1).abs(), torch.ones(4), atol=1e-4, rtol=0)


def test_an_adapter_whose_base_peft_has_changed_is_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, init_lora_weights="pissa", target_modules=["query"])
    peft.get_peft_model(tiny_model("bert"), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="init_lora_weights='pissa'") as caught:
        deltatune.read_adapter(tmp_path)
    assert "path_initial_model" in caught.value.hint


@pytest.mark.parametrize(
    ("method", "why", "hint"),
    [
        ({"rank": 3, "init": "orthogonal"}, "even rank, not 3", "2 and 4"),
        ({"rank": 1, "init": "orthogonal"}, "even rank, not 1", "2"),
        ({"init": "orthogonal", "rank_pattern": {"mlp": 5}}, "even rank, not 5", "4 and 6"),
        ({"init": "pisa"}, "init", "pissa"),
    ],
)
def test_options_that_mean_nothing_are_refused(method: dict, why: str, hint: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        deltatune.make("lora", method)
    assert hint in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize("init", MOVING)
def test_a_rank_whose_double_does_not_fit_is_refused_with_the_largest_that_does(init: str) -> None:
    with pytest.raises(UserError, match="rank 34") as caught:
        attached("bert", LoRA(rank=17, init=init))
    assert caught.value.hint == "the largest rank is 16"


@pytest.mark.parametrize("init", ["orthogonal", "eva", *MOVING])
def test_over_embeddings_there_are_random_beginnings_only(init: str) -> None:
    with pytest.raises(UserError, match="embeddings"):
        attached("bert", LoRA(rank=2, init=init, targets="embeddings"))
    attached("bert", replace(LoRA(rank=2, targets="embeddings"), init="gaussian"))
