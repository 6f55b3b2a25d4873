"""Frozen layers that compute in bf16 do it in a loop of our own where that is faster, and give what they gave."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import deltatune
from deltatune import Base, LoRA, kernels
from deltatune.data.tokens import Tokens
from deltatune.models.products import has_products, replace_products
from deltatune.models.quantise import quantise
from deltatune.training.tasks import task_for
from deltatune.weights import weight_of
from tiny import tiny_model, tokenizer

needs_products = pytest.mark.skipif(not kernels.multiplies_pairs(), reason="no processor for products of our own")


def layers(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), Conv1D(32, 96), nn.Linear(32, 5)).to(dtype).requires_grad_(False)


def passes(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of what comes in."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    return y.detach(), x.grad


def near(found: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(found.double(), exact.double(), rtol=0, atol=0.02 * exact.abs().max().item())


@needs_products
@pytest.mark.parametrize("storage", ["", "nf4"])
def test_layers_give_what_they_gave_and_so_do_their_gradients(storage: str) -> None:
    model, x = layers(), torch.randn(2, 7, 64).bfloat16()
    if storage:
        quantise(model, {"0": storage})
    quick = copy.deepcopy(model)
    replace_products(quick)
    assert has_products(quick)
    assert not has_products(model)
    found = passes(quick, x)
    for ours, plain in zip(found, passes(model, x), strict=True):
        near(ours, plain)
    with torch.no_grad():
        assert torch.equal(quick(x), found[0])
        assert torch.equal(quick(x)[:, 2:3], quick(x[:, 2:3])), "a text's numbers are the same among others"
    assert not list(quick.state_dict().keys() ^ model.state_dict().keys())


@needs_products
def test_what_trains_or_computes_in_fp32_is_left_as_it_is() -> None:
    for model in (layers(torch.float32), layers().requires_grad_()):
        replace_products(model)
        assert not has_products(model)
        assert not any("forward" in vars(module) for module in model)


@needs_products
def test_an_adapted_layer_multiplies_with_its_frozen_weight_in_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layers()
    deltatune.attach(model, LoRA(rank=2, targets="0"))
    x, seen = torch.randn(3, 64).bfloat16(), []
    product = kernels.product
    monkeypatch.setattr(kernels, "product", lambda *given: seen.append(given[1].shape) or product(*given))
    before = model(x)
    assert not seen
    replace_products(model)
    assert model[0].frozen._quick
    near(model(x), before)
    assert seen == [(96, 64), (32, 96)], "the last layer has no whole registers of outputs"


@needs_products
def test_texts_are_padded_no_further_than_the_longest_where_products_are_ours() -> None:
    """Our loops take any shape; PyTorch's library makes new kernels for each, so it sees lengths by eights."""
    model = tiny_model("bert", labels=2).requires_grad_(False).to(torch.bfloat16)
    task = task_for(Base(model, tokenizer("bert"), "", ""), "bf16")
    texts = Tokens(tuple({"input_ids": [5] * length} for length in (3, 13, 19)), (0, 1, 0), 0)
    assert task.collate(texts, (0, 1)).inputs["input_ids"].shape == (2, 16)
    replace_products(model)
    assert task.collate(texts, (0, 1)).inputs["input_ids"].shape == (2, 13)


def test_without_such_a_processor_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "multiplies_pairs", lambda: False)
    model = layers()
    replace_products(model)
    assert not has_products(model)
    assert not weight_of(model[0])._quick
