"""Dropout from random bits does what dropout does."""

import pytest
import torch
from torch import nn

from deltatune.dropout import Dropout, dropout, replace_dropout
from tiny import tiny_inputs, tiny_model


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_share_that_is_zeroed_is_p_and_the_mean_stays(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    y = dropout(torch.ones(1000, 1001, dtype=dtype), p).float()
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.003)
    assert y.mean().item() == pytest.approx(1, abs=0.01)
    assert y.unique().numel() == 2


def test_neighbours_are_zeroed_independently() -> None:
    torch.manual_seed(0)
    zero = (dropout(torch.ones(4_000_000), 0.3) == 0).float()
    for lag in (1, 2, 3, 4, 8):
        assert torch.corrcoef(torch.stack([zero[:-lag], zero[lag:]]))[0, 1].abs() < 0.003


def test_the_gradient_is_zero_where_the_output_is() -> None:
    x = torch.randn(7, 5, requires_grad=True)
    torch.manual_seed(0)
    y = dropout(x, 0.5)
    y.sum().backward()
    assert torch.equal(x.grad == 0, y == 0)
    assert torch.allclose(x.grad[x.grad != 0], torch.tensor(2.0))


def test_the_seed_decides_what_is_zeroed() -> None:
    x = torch.randn(50)
    torch.manual_seed(4)
    first = dropout(x, 0.5)
    second = dropout(x, 0.5)
    torch.manual_seed(4)
    assert torch.equal(dropout(x, 0.5), first)
    assert not torch.equal(first, second)


def test_a_model_keeps_its_output_in_evaluation_and_varies_in_training() -> None:
    model = tiny_model("bert")
    with torch.no_grad():
        before = model(**tiny_inputs()).logits
        replace_dropout(model)
        assert not [module for module in model.modules() if type(module) is nn.Dropout]
        assert sum(isinstance(module, Dropout) for module in model.modules()) == 8
        assert torch.equal(model(**tiny_inputs()).logits, before)
        model.train()
        assert not torch.equal(model(**tiny_inputs()).logits, model(**tiny_inputs()).logits)
