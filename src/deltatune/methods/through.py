"""y = x·(W + ΔW)ᵀ + b where ΔW has to be made whole: nothing of its size is kept from forward to backward."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from deltatune.weights import FrozenWeight

Update = Callable[..., Tensor]
"""Makes ΔW (out, in) from the trained parameters; differentiable."""


def through_update(
    x: Float[Tensor, "tokens in"],
    weight: FrozenWeight,
    bias: Float[Tensor, " out"] | None,
    update: Update,
    *parameters: Tensor,
) -> Float[Tensor, "tokens out"]:
    """x·(W + update(*parameters))ᵀ + bias. Kept for backward: x and the parameters; ΔW is made again there."""
    y: Tensor = _Through.apply(x, weight, bias, update, *parameters)  # type: ignore[no-untyped-call]
    return y


class _Through(torch.autograd.Function):
    """Backward:   dx = dy·(W + ΔW),  dΔW = dyᵀ·x,  db = Σ dy,  and the parameters' gradients through `update`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: FrozenWeight, bias: Tensor | None, update: Update, *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        ctx.weight, ctx.update = weight, update
        # Two products: in 16 bits a small ΔW would be lost in the rounding of W + ΔW.
        return weight.matmul(x, bias).addmm_(x, update(*parameters).to(x.dtype).T)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        wants_x, _, wants_bias, _, *wants = ctx.needs_input_grad
        with torch.enable_grad():
            parameters = [p.detach().requires_grad_(want) for p, want in zip(parameters, wants, strict=True)]
            delta = ctx.update(*parameters)
        dx = None
        if wants_x:
            dx = ctx.weight.matmul_transposed(dy).addmm_(dy, delta.detach().to(dy.dtype))
        bias = dy.sum(0) if wants_bias else None
        wanted = [p for p in parameters if p.requires_grad]
        found = iter(torch.autograd.grad(delta, wanted, (dy.T @ x).to(delta.dtype))) if wanted else iter(())
        return dx, None, bias, None, *(next(found) if want else None for want in wants)
