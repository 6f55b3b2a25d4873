"""Root mean square norms on a CPU in one pass over what comes in, forward and backward.

Zhang & Sennrich 2019, arXiv 1910.07467, equation 4. Transformers' norms make half a dozen tensors of the input's size
in fp32, forward and backward; each is fetched from memory and put back. Here only the result is.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltatune import kernels


class RMSNorm(nn.Module):
    """w · x / √(mean(x²) + ε) over the last dimension; computed in fp32, rounded to the type of x before w."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon

    def forward(self, x: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape width"]:
        """The same shape and, of a frozen weight in that type, the type of x."""
        if self.weight.requires_grad or not kernels.ready(x, self.weight):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)).to(x.dtype)
        normed: Tensor = _Normed.apply(x.reshape(-1, x.shape[-1]), self.weight, self.epsilon)  # type: ignore[no-untyped-call]
        return normed.view(x.shape)


class _Normed(torch.autograd.Function):
    """`kernels.rms_norm`, which keeps its input and one number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        y, scales = kernels.rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, scales)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scales = ctx.saved_tensors
        return kernels.rms_norm_backward(x, weight, scales, dy), None, None


@torch.no_grad()
def replace_norms(model: nn.Module) -> None:
    """Puts `RMSNorm` in the place of every frozen norm on a CPU that gives what it gives, by whatever name.

    In an outline, which has no numbers to try it with, those of Gemma are known to give something else.
    """
    for path, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not ("RMSNorm" in type(module).__name__ or type(module).__name__ == "T5LayerNorm") or epsilon is None:
            continue
        if not isinstance(weight, nn.Parameter) or weight.requires_grad or not kernels.ready(weight):
            continue
        norm = RMSNorm(weight, epsilon).train(module.training)
        if "Gemma" not in type(module).__name__ if weight.is_meta else _same(norm, module):
            model.set_submodule(path, norm)


def _same(norm: RMSNorm, module: nn.Module) -> bool:
    x = torch.linspace(-2, 3, 3 * len(norm.weight), dtype=norm.weight.dtype).view(1, 3, -1)
    return torch.allclose(norm(x), module(x), rtol=0.01, atol=1e-5)
