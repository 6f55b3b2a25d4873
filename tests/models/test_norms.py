"""A norm that is computed in one pass is the norm of the formula, for whatever architecture has it."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from deltatune import kernels
from deltatune.models.norms import RMSNorm, replace_norms
from tiny import tiny_model


def weight(width: int = 48, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.linspace(0.5, 2, width, dtype=dtype), requires_grad=False)


@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (2, 3, 1500, 48)], ids=str)
def test_it_gives_the_formula_and_its_gradient(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = []
    for norm in (RMSNorm(weight(), 1e-5), theirs(LlamaRMSNorm)):
        y = norm(x)
        y.backward(dy)
        found.append((y.detach(), x.grad))
        x.grad = None
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def theirs(kind: type[nn.Module], width: int = 48) -> nn.Module:
    norm = kind(width, eps=1e-5)
    norm.weight = weight(width)
    return norm


def test_in_bf16_it_is_as_near_to_the_formula_as_the_plain_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(64, 48, generator=generator).bfloat16() for _ in range(2))
    errors = []
    exact = x.double().requires_grad_()
    RMSNorm(weight(dtype=torch.float64), 1e-5)(exact).backward(dy.double())
    for norm in (RMSNorm(weight(dtype=torch.bfloat16), 1e-5), theirs(LlamaRMSNorm).bfloat16()):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        assert y.dtype == torch.bfloat16
        y.backward(dy)
        errors.append(float((leaf.grad - exact.grad).norm() / exact.grad.norm()))
    assert errors[0] < 1.1 * errors[1]


def test_a_weight_that_trains_gets_its_gradient() -> None:
    x = torch.randn(4, 48)
    ours, plain = RMSNorm(weight().requires_grad_(), 1e-5), theirs(LlamaRMSNorm).requires_grad_()
    for norm in (ours, plain):
        norm(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)


needs_kernels = pytest.mark.skipif(bool(kernels.missing()), reason=kernels.missing())


@needs_kernels
@pytest.mark.parametrize(
    ("kind", "replaced"), [(LlamaRMSNorm, True), (T5LayerNorm, True), (nn.RMSNorm, True), (GemmaRMSNorm, False)]
)
def test_what_gives_the_same_is_replaced_and_nothing_else(kind: type[nn.Module], replaced: bool) -> None:
    """Gemma multiplies by 1 + w."""
    model = nn.Sequential(theirs(kind))
    replace_norms(model)
    assert isinstance(model[0], RMSNorm) == replaced


@needs_kernels
def test_replacing_keeps_names_and_weights_and_leaves_those_that_train() -> None:
    model = tiny_model("llama").requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    before = dict(model.named_parameters())
    ids = torch.arange(4, 16).view(2, 6)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        replace_norms(model)
        assert sum(isinstance(module, RMSNorm) for module in model.modules()) == 4
        assert not isinstance(model.model.norm, RMSNorm)
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
