"""Products with frozen weights in loops of our own, on processors where those beat PyTorch's."""

from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltatune import kernels
from deltatune.weights import QuantisedLinear, is_linear, weight_of
from deltatune.weights.frozen import QUICK, linear


def replace_products(model: nn.Module) -> None:
    """Lets every frozen linear layer that computes in bf16 do it in a loop of our own, whoever asks for its weight.

    Which products that loop takes, `kernels.multiplies` says; the others stay PyTorch's.
    """
    if not kernels.multiplies_pairs():
        return
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            setattr(module, QUICK, True)
        elif is_linear(module) and _frozen(module):
            setattr(module, QUICK, True)
            module.forward = MethodType(_forward, module)


def has_products(model: nn.Module) -> bool:
    """Whether a layer of the model does."""
    return any(QUICK in vars(module) for module in model.modules())


def _frozen(module: nn.Module) -> bool:
    weight = module.weight
    return isinstance(weight, Tensor) and weight.dtype == torch.bfloat16 and not weight.requires_grad


def _forward(self: Any, x: Float[Tensor, "*shape in"]) -> Float[Tensor, "*shape out"]:
    return linear(x, weight_of(self), self.bias)
