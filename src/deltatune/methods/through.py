"""y = x·(W + ΔW)ᵀ + b where ΔW has to be made whole: nothing of its size is kept from forward to backward."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
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
    dropped: Float[Tensor, "tokens in"] | None = None,
) -> Float[Tensor, "tokens out"]:
    """x·(W + update(*parameters))ᵀ + bias; with `dropped`, that is the input of the update, and x that of W alone.

    Kept for backward: the update's input and the parameters; ΔW is made again there.
    """
    y: Tensor = _Through.apply(x, dropped, weight, bias, update, *parameters)  # type: ignore[no-untyped-call]
    return y


class _Through(torch.autograd.Function):
    """Backward, with z = x or the dropped x:   dz = dy·ΔW,  dx = dy·W (+ dz),  dΔW = dyᵀ·z,  db = Σ dy.

    The parameters' gradients come through `update`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor | None,
        weight: FrozenWeight,
        bias: Tensor | None,
        update: Update,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x if z is None else z, *parameters)
        ctx.weight, ctx.update, ctx.dropped = weight, update, z is not None
        delta = update(*parameters)
        if z is None:
            return F.linear(x, _sum(weight, delta, x.dtype), None if bias is None else bias.to(x.dtype))
        return weight.matmul(x, bias).addmm_(z, delta.to(x.dtype).T)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, *parameters = ctx.saved_tensors
        wants_x, wants_z, _, wants_bias, _, *wants = ctx.needs_input_grad
        with torch.enable_grad():
            parameters = [p.detach().requires_grad_(want) for p, want in zip(parameters, wants, strict=True)]
            made = ctx.update(*parameters)
        delta = made.detach()
        dx = dz = None
        if wants_x:
            dx = ctx.weight.matmul_transposed(dy) if ctx.dropped else dy @ _sum(ctx.weight, delta, dy.dtype)
        if wants_z:
            dz = dy @ delta.to(dy.dtype)
        bias = dy.sum(0) if wants_bias else None
        wanted = [p for p in parameters if p.requires_grad]
        found = iter(torch.autograd.grad(made, wanted, (dy.T @ z).to(made.dtype))) if wanted else iter(())
        return dx, dz, None, bias, None, *(next(found) if want else None for want in wants)


def _sum(weight: FrozenWeight, delta: Float[Tensor, "out in"], dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """W + ΔW, added before it is rounded to 16 bits; that loses no more than rounding two products would."""
    return (weight.dense() + delta).to(dtype)
