"""DoRA against the paper, against a naive implementation, and against PEFT's files."""

import copy
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import deltatune
from conformance.cases import adapted, shaken
from deltatune import DoRA, LoRA, UserError, kernels
from deltatune.dropout import dropout
from deltatune.files import read_json
from deltatune.methods import Site, dora
from deltatune.models.adapted import AdaptedEmbedding, AdaptedLinear
from deltatune.models.adapters import CONFIG, TENSORS
from deltatune.models.attach import adapted_layers
from deltatune.models.products import replace_products
from deltatune.models.quantise import quantise
from peer import peft_adapter
from tiny import tiny_inputs, tiny_model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs()).logits


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("bert", {"r": 4, "lora_alpha": 12, "target_modules": ["query", "output.dense"]}),
        ("roberta", {"r": 4, "use_rslora": True, "target_modules": "all-linear"}),
        ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("llama", {"r": 4, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}}),
        ("t5", {"r": 3, "target_modules": ["q", "wo"], "alpha_pattern": {"wo": 5}}),
        ("bert", {"r": 4, "target_modules": ["word_embeddings", "query"]}),
    ],
)
def test_an_adapter_that_peft_made_gives_its_logits_here(architecture: str, options: dict, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="SEQ_CLS", use_dora=True, **options)
    theirs = peft_adapter(tmp_path, architecture, config)
    ours = deltatune.load_adapter(tiny_model(architecture), tmp_path)
    assert isinstance(ours.attachment.method, DoRA)
    torch.testing.assert_close(logits(ours), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("magnitude", ["per-output-row", "scalar-frobenius", "normalised-update"])
def test_embeddings_train_merge_and_load_in_peft(magnitude: str, tmp_path: Path) -> None:
    method = DoRA(rank=3, magnitude=magnitude, targets=("embeddings", "query"))
    torch.testing.assert_close(logits(deltatune.attach(tiny_model("bert"), method)), logits(tiny_model("bert")))
    model = shaken(deltatune.attach(tiny_model("bert"), method))
    assert any(isinstance(layer, AdaptedEmbedding) for layer in adapted_layers(model).values())
    model(**tiny_inputs()).logits.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for layer in adapted_layers(model).values() for p in layer.delta.parameters())
    before = logits(model)
    deltatune.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), before, atol=1e-5, rtol=1e-5)
    deltatune.merge(model)
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)


def test_each_row_of_the_adapted_weight_has_the_length_that_was_learnt() -> None:
    layer = shaken(adapted(DoRA(rank=3), "linear").double())
    rows = layer.delta.merged(layer.weight).norm(dim=1)
    torch.testing.assert_close(rows, layer.delta.m.abs())
    whole = shaken(adapted(DoRA(rank=3, magnitude="scalar-frobenius"), "linear").double())
    torch.testing.assert_close(whole.delta.merged(whole.weight).norm(), whole.delta.m.abs().squeeze())
    update = shaken(adapted(DoRA(rank=3, magnitude="normalised-update"), "linear").double())
    torch.testing.assert_close((update.delta.merged(update.weight) - update.weight).norm(dim=1), update.delta.m.abs())


def test_the_factorised_norm_is_that_of_the_whole_matrix() -> None:
    layer = shaken(adapted(DoRA(rank=3), "linear").double())
    delta = layer.delta
    naive = (layer.weight + delta.scale * delta.B @ delta.A).norm(dim=1)
    torch.testing.assert_close(delta.norm(layer.frozen, torch.float64), naive.detach(), atol=1e-13, rtol=1e-13)


def test_magnitudes_begin_as_the_norms_of_the_weight_and_the_output_as_that_of_the_base_to_the_bit() -> None:
    layer = adapted(DoRA(rank=3), "linear").eval()
    torch.testing.assert_close(layer.delta.m.detach(), layer.weight.norm(dim=1))
    x = torch.randn(5, 12)
    assert torch.equal(layer(x), F.linear(x, layer.weight) + layer.bias)


@pytest.mark.parametrize("magnitude", ["per-output-row", "scalar-frobenius", "normalised-update"])
def test_gradients_under_dropout_are_those_of_the_formula_with_the_norm_held(magnitude: str) -> None:
    layer = shaken(adapted(DoRA(rank=3, dropout=0.5, magnitude=magnitude), "linear").double()).train()
    delta, W = layer.delta, layer.weight
    x = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    fast = layer(x)
    torch.manual_seed(5)
    update = delta.scale * dropout(x, 0.5) @ delta.A.T @ delta.B.T
    factor = delta.m / delta.norm(layer.frozen, torch.float64)
    base = F.linear(x, W)
    plain = (base + factor * update if magnitude == "normalised-update" else factor * (base + update)) + layer.bias
    torch.testing.assert_close(fast, plain)
    wanted = [x, *delta.parameters()]
    outward = torch.randn_like(fast)
    for ours, theirs in zip(
        torch.autograd.grad(fast, wanted, outward), torch.autograd.grad(plain, wanted, outward), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("training", [True, False])
def test_the_norm_is_never_stale_however_a_loop_writes_to_the_parameters(training: bool) -> None:
    """PyTorch's fused AdamW does not count what it writes; neither does `.data`."""
    layer = shaken(adapted(DoRA(rank=3), "linear")).train(training)
    x = torch.randn(5, 12)

    def right() -> bool:
        plain = F.linear(x, layer.delta.merged(layer.frozen.dense()), layer.bias)
        return torch.allclose(layer(x), plain, atol=1e-5)

    for fused in (True, False):
        optimizer = torch.optim.AdamW(layer.delta.parameters(), lr=0.1, fused=fused)
        layer(x).square().sum().backward()
        optimizer.step()
        assert right()
    layer.delta.A.data.add_(0.5)
    assert right()
    with torch.no_grad():
        layer.delta.B.copy_(torch.randn(20, 3))
    assert right()
    other = shaken(adapted(DoRA(rank=3), "linear"), seed=8).delta
    layer.delta.load_state_dict(other.state_dict())
    assert right()
    with torch.no_grad():
        layer.weight.mul_(2)
    assert right(), "the base's weight was written to"
    layer.bfloat16().float()
    assert right(), "the base's weight was rounded"
    layer.merge()
    layer.unmerge()
    assert right()
    assert copy.deepcopy(layer)(x).equal(layer(x))
    layer.double()
    x = x.double()
    assert right()


def test_the_norm_is_computed_once_between_two_steps() -> None:
    layer = shaken(adapted(DoRA(rank=3), "linear")).train()
    x = torch.randn(5, 12)
    layer(x)
    first = layer.delta.norm(layer.frozen, x.dtype)
    layer(2 * x)
    assert layer.delta.norm(layer.frozen, x.dtype) is first


@pytest.mark.parametrize("magnitude", ["per-output-row", "scalar-frobenius", "normalised-update"])
def test_norms_that_a_step_finds_are_those_that_it_would_compute(
    magnitude: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = DoRA(rank=3, magnitude=magnitude)
    storages = ["linear", "linear-bf16", "linear", "conv1d", "nf4"]
    layers = {str(seed): shaken(adapted(method, storage), seed) for seed, storage in enumerate(storages)}
    deltas = {path: layer.delta for path, layer in layers.items()}
    method.after_step(deltas, 1, 2)  # before any was needed
    for seed, layer in layers.items():
        layer(torch.randn(5, 12, dtype=layer.weight.dtype))
        shaken(layer, 10 + int(seed))
    method.after_step(deltas, 2, 2)
    for layer in layers.values():
        with monkeypatch.context() as patch:
            if layer.delta.due() is not None:
                patch.setattr(layer.delta, "rows", None)  # it is there
            found = layer.delta.norm(layer.frozen, layer.weight.dtype)
        fresh = copy.deepcopy(layer)  # which has none
        assert torch.equal(fresh.delta.norm(fresh.frozen, layer.weight.dtype), found)


needs_products = pytest.mark.skipif(not kernels.multiplies_pairs(), reason="no processor for products of our own")


def quick(method: DoRA, storage: str = "", bias: bool = False) -> AdaptedLinear:
    """A layer in bf16 with products of our own, and with magnitudes that are not the norms."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96, bias=bias)).bfloat16().requires_grad_(False)
    if storage:
        quantise(model, {"0": storage})
    deltatune.attach(model, method)
    replace_products(model)
    layer = shaken(model[0])
    assert isinstance(layer, AdaptedLinear)
    return layer.train()


def passes(layer: AdaptedLinear, x: torch.Tensor, dy: torch.Tensor, exactly: bool) -> list[torch.Tensor]:
    """What comes out, and the gradients of x, A, B and m: of the layer, or as the paper's equation has it in double."""
    delta = layer.delta
    wanted = [
        one.detach().to(torch.float64 if exactly else one.dtype).requires_grad_() for one in (x, *delta.parameters())
    ]
    torch.manual_seed(5)
    if exactly:
        x, A, B, m = wanted
        W = layer.frozen.dense().double()
        norms = (W + delta.scale * B @ A).norm(dim=1).detach()
        kept = (
            dropout(torch.ones_like(x, dtype=torch.bfloat16), delta.dropout).double()
            if delta.dropout and layer.training
            else 1
        )
        y = m / norms * (x @ W.T + delta.scale * (x * kept) @ A.T @ B.T) + (0 if layer.bias is None else layer.bias)
    else:
        wanted[1:] = delta.parameters()
        y = layer(wanted[0])
    return [y.detach(), *torch.autograd.grad(y, wanted, dy.to(y.dtype))]


@needs_products
@pytest.mark.parametrize("dropped", [0.0, 0.5], ids=["", "dropout"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("storage", ["", "nf4"])
def test_a_product_that_finds_its_norms_gives_what_the_equation_does(
    storage: str, bias: bool, dropped: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dora, "low_rank", None)  # nothing else computes it
    layer = quick(DoRA(rank=4, dropout=dropped), storage, bias)
    x, dy = (torch.randn(50, size, generator=torch.Generator().manual_seed(size)).bfloat16() for size in (64, 96))
    for ours, exact in zip(passes(layer, x, dy, False), passes(layer, x, dy, True), strict=True):
        assert (ours.double() - exact).norm() < 5e-3 * exact.norm()
    with torch.inference_mode():
        before = layer.eval()(x)
    assert before.equal(layer(x)), "what an evaluation leaves behind serves training"
    with torch.no_grad():
        layer.delta.B.mul_(2)
        layer.delta.m.data.mul_(1.5)
    stale = passes(layer, x, dy, True)[0] - layer(x)
    assert stale.norm() < 5e-3 * layer(x).norm(), "no norm is older than what it is of"


@needs_products
def test_a_magnitude_of_zero_has_its_gradient() -> None:
    layer = quick(DoRA(rank=4))
    with torch.no_grad():
        layer.delta.m[7] = 0
    x, dy = (torch.randn(50, size).bfloat16() for size in (64, 96))
    (*_, ours), (*_, exact) = passes(layer, x, dy, False), passes(layer, x, dy, True)
    assert exact[7] != 0
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=5e-3 * exact.abs().max().item())


@needs_products
def test_nothing_is_kept_of_an_output_but_itself() -> None:
    layer, x = quick(DoRA(rank=4)), torch.randn(500, 64).bfloat16().requires_grad_()
    kept: dict[int, int] = {}

    def keep(one: torch.Tensor) -> torch.Tensor:
        kept[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        return one

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        y = layer(x)
    thin = 500 * 8 * 4 + 4 * (64 + 2 * 96) * 4 + 3 * 96 * 4
    assert sum(kept.values()) <= x.nbytes + y.nbytes + thin


@pytest.mark.parametrize("magnitude", ["per-output-row", "scalar-frobenius", "normalised-update"])
def test_what_has_no_direction_stays_finite(magnitude: str) -> None:
    layer = adapted(DoRA(rank=3, magnitude=magnitude), "linear")
    with torch.no_grad():
        layer.weight[4] = 0
        layer.delta.B.zero_()
        layer.delta.m.fill_(0.7)
        layer.delta.m[-1:] = 0
    y = layer(torch.randn(5, 12))
    y.square().sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.delta.parameters())
    if magnitude == "normalised-update":
        assert torch.equal(layer.delta.merged(layer.weight), layer.weight)
        assert layer.delta.B.grad.abs().sum() > 0, "it can leave zero"


def test_a_small_change_of_the_magnitude_shows_in_16_bits() -> None:
    layer = adapted(DoRA(rank=3), "linear-bf16").train()
    x = torch.randn(64, 12).bfloat16()
    before = layer(x)
    with torch.no_grad():
        layer.delta.m.mul_(1 + 0.9 * 2**-8)  # bf16 rounds it to 1
    assert (layer(x) != before).float().mean() > 0.5


def test_it_trains_a_magnitude_for_each_output_more_than_lora() -> None:
    site = Site(768, 3072)
    assert DoRA(rank=8).parameters(site) == 8 * (768 + 3072) + 768
    assert DoRA(rank=8, magnitude="scalar-frobenius").parameters(site) == LoRA(rank=8).parameters(site) + 1


def test_magnitudes_have_no_weight_decay_since_they_are_vectors() -> None:
    layers = adapted_layers(deltatune.attach(tiny_model("bert"), DoRA(rank=2))).values()
    assert all(layer.delta.m.ndim == 1 for layer in layers)


def test_its_relatives_are_saved_as_what_peft_has() -> None:
    assert DoRA(rank=3, magnitude="scalar-frobenius").portable() == DoRA(rank=3)
    assert DoRA(rank=3, magnitude="normalised-update", targets="mlp").portable() == LoRA(rank=3, targets="mlp")


def test_the_folder_is_peft_s_own(tmp_path: Path) -> None:
    deltatune.save_adapter(deltatune.attach(tiny_model("bert"), DoRA(rank=2, targets="query")), tmp_path)
    assert read_json(tmp_path / CONFIG)["use_dora"] is True
    keys = {key.partition(".query.")[2] for key in load_file(tmp_path / TENSORS) if ".query." in key}
    assert keys == {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"rank": 0}, "dora: rank must be at least 1"),
        ({"rank_pattern": {"mlp": 0}}, "dora: rank must be at least 1"),
        ({"alpha": -1.0}, "dora: alpha must be a positive number"),
        ({"dropout": 1.0}, "dora: dropout"),
    ],
)
def test_values_that_mean_nothing_are_refused(options: dict, why: str) -> None:
    with pytest.raises(UserError, match=why):
        DoRA(**options)


def test_a_rank_above_that_of_the_weight_is_refused_with_the_largest_that_fits() -> None:
    with pytest.raises(UserError, match="dora: rank 33") as caught:
        deltatune.attach(tiny_model("bert"), DoRA(rank=33, targets="query"))
    assert "32" in caught.value.hint


def test_an_unknown_magnitude_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="scalar-frobenius"):
        deltatune.make("dora", {"magnitude": "scalar"})


def test_biases_that_peft_trained_beside_it_are_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="SEQ_CLS", use_dora=True, bias="lora_only", target_modules=["query"])
    peft.get_peft_model(tiny_model("bert"), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="bias='lora_only'"):
        deltatune.read_adapter(tmp_path)
