"""GELU of bf16 on a CPU in one pass, forward and backward, to the digits that bf16 has.

Hendrycks & Gimpel 2016, arXiv 1606.08415, section 2: x·Φ(x), and its approximation with tanh. PyTorch computes either
to fp32's digits; a polynomial is enough here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deltatune import kernels


class GELU(nn.GELU):
    """PyTorch's, but in one pass for bf16 on a CPU."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The same shape and type."""
        if x.dtype != torch.bfloat16 or not kernels.ready(x):
            return super().forward(x)
        y: Tensor = _InOnePass.apply(x, self.approximate == "tanh")  # type: ignore[no-untyped-call]
        return y


class _InOnePass(torch.autograd.Function):
    """`kernels.gelu`, which keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tanh: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tanh = tanh
        return kernels.gelu(x, tanh)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return kernels.gelu_backward(x, dy, ctx.tanh), None


def replace_gelu(model: nn.Module) -> None:
    """Puts `GELU` in the place of every module that gives what one of its two forms gives, by whatever name."""
    x = torch.linspace(-12, 12, 49, device="cpu")
    for path, module in list(model.named_modules()):
        if "gelu" not in type(module).__name__.lower() or next(module.parameters(), None) is not None:
            continue
        for form in ("none", "tanh"):
            if torch.allclose(module(x), F.gelu(x, approximate=form), rtol=0, atol=1e-5):
                model.set_submodule(path, GELU(form).train(module.training))
                break
