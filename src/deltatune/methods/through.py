"""y = x·W'ᵀ + b where W' has to be made whole: nothing of its size is kept from forward to backward.

W' is W plus a whole ΔW, or W with something added to some of its entries alone. Both are one product with W', which in
16 bits loses no more of a small update than a sum of two products does: the output is rounded either way.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from deltatune.weights import FrozenWeight

Make = Callable[..., Tensor]
"""Makes ΔW (out, in), or what is added to the entries (entries,), from the trained parameters; differentiable."""


def through_update(
    x: Float[Tensor, "tokens in"],
    weight: FrozenWeight,
    bias: Float[Tensor, " out"] | None,
    update: Make,
    *parameters: Tensor,
    dropped: Float[Tensor, "tokens in"] | None = None,
) -> Float[Tensor, "tokens out"]:
    """x·(W + update(*parameters))ᵀ + bias; with `dropped`, that is the input of the update, and x that of W alone.

    Kept for backward: the update's input and the parameters; ΔW is made again there.
    """
    y: Tensor = _Through.apply(x, dropped, weight, bias, update, None, *parameters)  # type: ignore[no-untyped-call]
    return y


def through_entries(
    x: Float[Tensor, "tokens in"],
    weight: FrozenWeight,
    bias: Float[Tensor, " out"] | None,
    places: Int[Tensor, " entries"],
    values: Make,
    *parameters: Tensor,
) -> Float[Tensor, "tokens out"]:
    """x·W'ᵀ + bias, where W' is W with values(*parameters) added at `places` (row·in + column, each one once).

    Kept for backward: x and the parameters; W' is made again there.
    """
    y: Tensor = _Through.apply(x, None, weight, bias, values, places, *parameters)  # type: ignore[no-untyped-call]
    return y


class _Through(torch.autograd.Function):
    """Backward:   dx = dy·W',  dW' = dyᵀ·x (at the places),  db = Σ dy,  and the parameters' gradients through `make`.

    With z, the dropped x, given for the update:   dx = dy·W,  dz = dy·ΔW,  dΔW = dyᵀ·z.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor | None,
        weight: FrozenWeight,
        bias: Tensor | None,
        make: Make,
        places: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x if z is None else z, *parameters)
        ctx.weight, ctx.make, ctx.places, ctx.dropped = weight, make, places, z is not None
        made = make(*parameters)
        if z is None:
            return F.linear(x, _changed(weight, made, places, x.dtype), None if bias is None else bias.to(x.dtype))
        return weight.matmul(x, bias).addmm_(z, made.to(x.dtype).T)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, *parameters = ctx.saved_tensors
        wants_x, wants_z, _, wants_bias, _, _, *wants = ctx.needs_input_grad
        with torch.enable_grad():
            parameters = [p.detach().requires_grad_(want) for p, want in zip(parameters, wants, strict=True)]
            made = ctx.make(*parameters)
        dx = dz = None
        if wants_x and ctx.dropped:
            dx = ctx.weight.matmul_transposed(dy)
        elif wants_x:
            dx = dy @ _changed(ctx.weight, made.detach(), ctx.places, dy.dtype)
        if wants_z:
            dz = dy @ made.detach().to(dy.dtype)
        bias = dy.sum(0) if wants_bias else None
        wanted = [p for p in parameters if p.requires_grad]
        gradient = dy.T @ z  # the whole of it, even for a few entries: to gather rows for each takes longer
        gradient = gradient if ctx.places is None else gradient.take(ctx.places)
        found = iter(torch.autograd.grad(made, wanted, gradient.to(made.dtype)) if wanted else ())
        return dx, dz, None, bias, None, None, *(next(found) if want else None for want in wants)


def _changed(
    weight: FrozenWeight, made: Tensor, places: Int[Tensor, " entries"] | None, dtype: torch.dtype
) -> Float[Tensor, "out in"]:
    """W' in the given type, in the layout of W; the sums are rounded once."""
    dense = weight.dense()
    if places is None:
        return (dense + made).to(dtype)
    return dense.to(dtype, copy=True).put_(places, (dense.take(places) + made).to(dtype))


def through_frozen(
    x: Float[Tensor, "tokens in"], weight: FrozenWeight, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "tokens out"]:
    """x·Wᵀ + bias through a weight that gets no gradient: nothing is kept for backward."""
    y: Tensor = _ThroughFrozen.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


class _ThroughFrozen(torch.autograd.Function):
    """Backward:   dx = dy·W,  db = Σ dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return weight.matmul(x, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wants_x, _, wants_bias = ctx.needs_input_grad
        return ctx.weight.matmul_transposed(dy) if wants_x else None, None, dy.sum(0) if wants_bias else None
