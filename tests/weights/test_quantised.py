"""A linear layer with its weight in another storage: the ordinary layer's behaviour, and nothing kept but codes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltatune.weights import FORMATS, QuantisedLinear, Storage, parse_storage, weight_of

every_format = pytest.mark.parametrize("format", FORMATS)


def quantised(words: str = "nf4", *, conv1d: bool = False) -> QuantisedLinear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = Conv1D(20, 12) if conv1d else nn.Linear(12, 20)
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return QuantisedLinear.of(layer, parse_storage(words))


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, 12, generator=torch.Generator().manual_seed(1)).to(dtype)


@every_format
@pytest.mark.parametrize("conv1d", [False, True])
def test_it_computes_what_the_ordinary_layer_with_the_decoded_weight_does(format: str, conv1d: bool) -> None:
    layer = quantised(format, conv1d=conv1d)
    x = inputs(3, 5).requires_grad_()
    plain = layer.dense_layer()
    assert type(plain) is (Conv1D if conv1d else nn.Linear)
    ours, theirs = layer(x), plain(x)
    torch.testing.assert_close(ours, theirs)
    outward = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    dx, db = torch.autograd.grad(ours, (x, layer.bias), outward)
    torch.testing.assert_close(dx, torch.autograd.grad(theirs, x, outward)[0])
    torch.testing.assert_close(db, outward.sum((0, 1)))


def test_nothing_is_kept_for_backward() -> None:
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        quantised()(inputs(4).requires_grad_())
    assert not kept


@every_format
def test_the_weight_answers_every_question(format: str) -> None:
    weight = weight_of(quantised(format))
    dense = weight.dense().float()
    assert dense.shape == (weight.out, weight.in_) == (20, 12)
    torch.testing.assert_close(weight.row_norms(), torch.linalg.vector_norm(dense, dim=1))
    x, g = inputs(6), torch.randn(6, 20, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(weight.matmul(x), x @ dense.T)
    torch.testing.assert_close(weight.matmul_transposed(g), g @ dense)
    in_16 = weight.matmul(x.bfloat16())
    assert in_16.dtype == torch.bfloat16
    assert torch.equal(in_16, F.linear(x.bfloat16(), dense.bfloat16()))


def test_norms_of_many_rows_are_decoded_in_parts_that_end_within_blocks() -> None:
    layer = QuantisedLinear.of(nn.Linear(700, 3001, bias=False), Storage("nf3", block=256))
    weight = weight_of(layer)
    torch.testing.assert_close(weight.row_norms(), torch.linalg.vector_norm(weight.dense(), dim=1))


def test_writing_encodes_and_changes_the_version() -> None:
    weight = weight_of(quantised())
    before, version = weight.dense(), weight.version
    assert weight.version == version
    weight.write(2 * before)
    assert weight.version != version
    torch.testing.assert_close(weight.dense(), 2 * before, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_module_leaves_the_stored_numbers_alone(cast: torch.dtype) -> None:
    layer = quantised()
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    layer.to(cast)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.named_buffers())
    assert all(tensor.dtype == before[name].dtype for name, tensor in layer.named_buffers())
    assert layer.weight.dtype == layer.bias.dtype == layer.dense_layer().weight.dtype == cast
    assert layer(inputs(4, dtype=cast)).dtype == cast


def test_it_moves_to_another_device_and_is_copied_with_what_it_holds() -> None:
    layer = quantised()
    away = copy.deepcopy(layer).to("meta")
    assert {tensor.device.type for tensor in (*away.buffers(), *away.parameters(), away.weight)} == {"meta"}
    assert torch.equal(copy.deepcopy(layer)(inputs(2)), layer(inputs(2)))


@every_format
def test_a_state_dict_carries_it_to_another_layer(format: str) -> None:
    layer, other = quantised(format), QuantisedLinear(12, 20, parse_storage(format))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(inputs(4)), other(inputs(4)))


def test_the_stand_in_for_the_weight_has_its_looks_and_no_number() -> None:
    assert quantised().weight.shape == (20, 12)
    assert quantised(conv1d=True).weight.shape == (12, 20)
    assert quantised().weight.isnan().all()


def test_under_autocast_it_computes_in_its_type() -> None:
    layer = quantised()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(inputs(4))
    assert torch.equal(y, layer(inputs(4).bfloat16()))


def test_decoding_within_inference_mode_does_not_hinder_training_afterwards() -> None:
    layer = QuantisedLinear.of(nn.Linear(400, 300), Storage("nf4"))  # larger than any before in this process
    with torch.inference_mode():
        layer(torch.ones(1, 400))
    layer(torch.ones(1, 400, requires_grad=True)).sum().backward()
