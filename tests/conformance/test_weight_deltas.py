"""The laws of a module over one frozen weight, for every weight delta and every block insert on every storage."""

import pytest
import torch
from torch import nn

from conformance.cases import DELTAS, OVER_LAYERS, STORAGES, adapted, bits, plain_output, shaken, went_in
from deltatune.errors import UserError
from deltatune.methods import Delta, OverLayers
from deltatune.models.adapted import AdaptedLinear
from deltatune.weights import weight_of

every_method = pytest.mark.parametrize("method", OVER_LAYERS.values(), ids=OVER_LAYERS.keys())
PAIRS = {
    f"{storage}-{name}": (method, storage)
    for name, method in OVER_LAYERS.items()
    for storage in STORAGES
    if not ("," in name and storage in ("linear-bf16", "nf4"))  # variants change the formula, not what it is over
}
DELTA_PAIRS = {name: pair for name, pair in PAIRS.items() if pair[0] in DELTAS.values()}
on_every_storage = pytest.mark.parametrize(("method", "storage"), PAIRS.values(), ids=PAIRS.keys())
deltas_on_every_storage = pytest.mark.parametrize(("method", "storage"), DELTA_PAIRS.values(), ids=DELTA_PAIRS.keys())
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float64: 1e-12}


def inputs(layer: AdaptedLinear, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, 12, generator=torch.Generator().manual_seed(1)).to(layer.weight.dtype)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    scale = max(1.0, b.abs().max().item())
    return bool((a - b).abs().max().item() <= TOLERANCE[b.dtype] * scale)


def size(values: torch.Tensor) -> float:
    """Their root mean square."""
    return values.float().square().mean().sqrt().item()


def differentiable(method: OverLayers, layer: AdaptedLinear) -> list[nn.Parameter]:
    """The parameters whose gradient is the derivative; the others' is held against autograd of `merged` alone."""
    return [parameter for name, parameter in layer.delta.named_parameters() if name not in method.detached]


@on_every_storage
def test_training_starts_at_the_base(method: OverLayers, storage: str) -> None:
    layer = adapted(method, storage).eval()
    x = inputs(layer, 2, 5)
    if not method.start_distance(layer.site):
        assert close(layer(x), layer.base(x))
        return
    if isinstance(layer.delta, Delta):
        weight = layer.frozen.dense().float()
        actual = size(layer.delta.merged(weight) - weight)
    else:
        h = (went_in(x) if layer.delta.beside else layer.base(x)).float().flatten(0, -2)
        actual = size(layer.delta.added(h)) / size(h)
    assert 0.4 < actual / method.start_distance(layer.site) < 2.5


@on_every_storage
def test_counted_parameters_are_the_actual_ones(method: OverLayers, storage: str) -> None:
    layer = adapted(method, storage)
    counted = method.parameters(layer.site) + method.shared_parameters([layer.site])
    assert sum(p.numel() for p in layer.delta.parameters()) == counted


@on_every_storage
def test_only_the_delta_gets_gradients_and_the_base_keeps_its_bits(method: OverLayers, storage: str) -> None:
    layer = shaken(adapted(method, storage)).train()
    before = bits(layer.base)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        layer(inputs(layer, 2, 5)).float().square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.delta.parameters())
    assert all(p.grad is None for p in layer.base.parameters())
    assert all(torch.equal(layer.base.state_dict()[name], value) for name, value in before.items())


@deltas_on_every_storage
def test_the_merged_weight_gives_the_adapted_output(method: OverLayers, storage: str) -> None:
    layer = shaken(adapted(method, storage)).eval()
    x = inputs(layer, 2, 5)
    with torch.no_grad():
        before = layer(x)
        layer.merge()
        assert not torch.equal(layer.base(x), STORAGES[storage]()(x)), "the update is not nothing"
        assert close(layer(x), before)


@deltas_on_every_storage
def test_unmerging_restores_the_bits_of_the_base(method: OverLayers, storage: str) -> None:
    layer = shaken(adapted(method, storage))
    before = bits(layer.base)
    layer.merge()
    layer.unmerge()
    assert all(torch.equal(layer.base.state_dict()[name], value) for name, value in before.items())


@on_every_storage
def test_a_disabled_delta_is_the_base_bit_for_bit(method: OverLayers, storage: str) -> None:
    layer = shaken(adapted(method, storage)).eval()
    layer.active = None
    x = inputs(layer, 2, 5)
    assert torch.equal(layer(x), layer.base(x))


@on_every_storage
def test_what_an_evaluation_leaves_behind_serves_training(method: OverLayers, storage: str) -> None:
    layer = shaken(adapted(method, storage))
    x = inputs(layer, 2, 5)
    with torch.inference_mode():
        before = layer.eval()(x)
    y = layer.train()(x)
    y.square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)
    if not getattr(method, "dropout", 0.0):
        torch.testing.assert_close(y, before)


@deltas_on_every_storage
def test_a_merged_weight_that_is_not_finite_is_refused_and_the_base_left_alone(
    method: OverLayers, storage: str
) -> None:
    layer = shaken(adapted(method, storage))
    before = bits(layer.base)
    with torch.no_grad():
        next(iter(layer.delta.parameters())).fill_(torch.inf)
    with pytest.raises(UserError, match="not finite"):
        layer.merge()
    assert all(torch.equal(layer.base.state_dict()[name], value) for name, value in before.items())


@every_method
@pytest.mark.parametrize(("storage", "bias_trains"), [("linear", False), ("linear", True), ("conv1d", False)])
def test_the_fast_backward_is_that_of_the_plain_formula(method: OverLayers, storage: str, bias_trains: bool) -> None:
    layer = shaken(adapted(method, storage).double()).eval()
    if not hasattr(layer.delta, "bias") or layer.delta.bias is None:
        layer.base.bias.requires_grad_(bias_trains)
    x = inputs(layer, 6).requires_grad_()
    outward = torch.randn(6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    plain, fast = plain_output(layer, x), layer(x)
    assert close(fast, plain)
    for ours, theirs in zip(
        torch.autograd.grad(fast, trained, outward), torch.autograd.grad(plain, trained, outward), strict=True
    ):
        assert close(ours, theirs)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *differentiable(method, layer)), fast_mode=True)


@every_method
def test_dropout_in_training_has_the_gradient_of_what_it_computed(method: OverLayers) -> None:
    layer = shaken(adapted(method, "linear").double()).train()
    x = inputs(layer, 6).requires_grad_()

    def same_mask(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return layer(x)

    assert torch.autograd.gradcheck(same_mask, (x, *differentiable(method, layer)), fast_mode=True)


@on_every_storage
def test_nothing_of_the_weights_size_is_kept_for_backward(method: OverLayers, storage: str) -> None:
    layer = shaken(adapted(method, storage)).train()
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor  # held, so that no other tensor gets its place
        return tensor

    x = inputs(layer, 16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert weight_of(layer.base).dense().data_ptr() not in kept, "the frozen weight is not kept again"
    sizes = {tuple(sorted(tensor.shape)) for tensor in (*kept.values(), *layer.delta.buffers())}
    assert (12, 20) not in sizes, "nothing of the weight's size is kept"


@every_method
def test_any_number_of_leading_dimensions_gives_the_same_output(method: OverLayers) -> None:
    layer = shaken(adapted(method, "linear")).eval()
    x = inputs(layer, 2, 3, 5)
    assert close(layer(x).reshape(30, 20), layer(x.reshape(30, 12)))
    assert layer(x[0, 0, 0]).shape == (20,)


@every_method
def test_under_autocast_the_output_has_its_type(method: OverLayers) -> None:
    layer = shaken(adapted(method, "linear")).eval()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(inputs(layer, 4))
    assert y.dtype == torch.bfloat16
    assert close(y, layer(inputs(layer, 4)).bfloat16())


@every_method
def test_under_autocast_the_gradients_are_nearly_those_without(method: OverLayers) -> None:
    layer = shaken(adapted(method, "linear")).eval()
    # Random, because a sum with equal weights may cancel to next to nothing but what was rounded.
    outward = torch.randn(16, 20, generator=torch.Generator().manual_seed(2))

    def gradients(enabled: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(inputs(layer, 16))
        return list(torch.autograd.grad(y.float(), list(layer.delta.parameters()), outward))

    for ours, exact in zip(gradients(True), gradients(False), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() < 0.04 * exact.norm()


@every_method
def test_the_layer_looks_like_the_one_it_replaces(method: OverLayers) -> None:
    layer = adapted(method, "linear")
    base = layer.base
    assert isinstance(base, nn.Linear)
    assert (layer.in_features, layer.out_features) == (base.in_features, base.out_features)
    assert layer.weight is base.weight
    assert layer.bias.shape == base.bias.shape
