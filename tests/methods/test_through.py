"""A product with the changed weight, against a sum of two products."""

import pytest
import torch
from torch import nn

from deltatune.methods.through import through_update
from deltatune.weights import weight_of


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2])
def test_in_16_bits_one_product_is_as_exact_as_the_sum_of_two(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(384, 256, bias=False).bfloat16()
    weight = weight_of(layer)
    x = torch.randn(128, 384, generator=generator).bfloat16()
    update = size * weight.dense().float().std() * torch.randn(256, 384, generator=generator)
    exact = x.double() @ (weight.dense().double() + update.double()).T
    with torch.no_grad():
        once = through_update(x, weight, None, lambda made: made, update)
        twice = weight.matmul(x).addmm_(x, update.bfloat16().T)
    error = [(y.double() - exact).norm() for y in (once, twice)]
    assert error[0] < 1.05 * error[1]
