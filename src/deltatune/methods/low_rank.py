"""y = x·Wᵀ + b + s·(z·Aᵀ)·Bᵀ: a frozen product and two thin ones beside it, and their gradients.

Hu et al. 2021, arXiv 2106.09685, equation 3. z is x, or what dropout left of it. Backward, with h = z·Aᵀ, dh = s·dy·B:

    dx = dy·W (+ dh·A)      dz = dh·A      dA = dhᵀ·z      dB = s·dyᵀ·h      db = Σ dy

With a magnitude (`magnitude.py`) what is without b is Z, y = m/n ⊙ Z + b, and dZ stands for dy but in db.

A product of so few columns keeps no matrix unit busy: what it costs is starting it and reading its inputs. So for small
ranks `kernels` has loops for them, which read the inputs once or twice, and the frozen product ends with h·Bᵀ, or dh·A.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from deltatune import kernels
from deltatune.methods.magnitude import magnified, magnified_backward, summed, wide
from deltatune.weights import FrozenWeight


def low_rank(
    x: Float[Tensor, "tokens in"],
    z: Float[Tensor, "tokens in"] | None,
    weight: FrozenWeight,
    bias: Float[Tensor, " out"] | None,
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    scale: float,
    m: Float[Tensor, " magnitudes"] | None = None,
    n: Float[Tensor, " magnitudes"] | None = None,
) -> Float[Tensor, "tokens out"]:
    """x·Wᵀ + b + scale·(z·Aᵀ)·Bᵀ in the type of x, where z is the dropped input, or x itself when it is None.

    With m and n, (out,) or (1,), all but b is multiplied by m/n, and n gets no gradient. Kept for backward: z, z·Aᵀ, A
    and scale·B, of a high rank A and B in the type of x; and with m what it multiplies.
    """
    small = len(A) <= kernels.HIGHEST_RANK and A.dtype == B.dtype == torch.float32 and kernels.ready(x)
    way = _Compiled if small else _Products
    y: Tensor = way.apply(x, z, weight, bias, A, B, scale, m, n)  # type: ignore[no-untyped-call]
    return y


class _Products(torch.autograd.Function):
    """The thin products in the type of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor | None,
        weight: FrozenWeight,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        m: Tensor | None,
        n: Tensor | None,
    ) -> Tensor:
        ctx.types, ctx.scale = (A.dtype, B.dtype), scale
        A, B = A.to(x.dtype), (scale * B).to(x.dtype)
        branch = x if z is None else z
        h = branch @ A.T  # (tokens, rank)
        Z = weight.matmul(x, bias if m is None else None).addmm_(h, B.T)
        ctx.save_for_backward(branch, A, B, h, None if m is None else Z, m, n)
        ctx.weight, ctx.dropped = weight, z is not None
        return Z if m is None or n is None else magnified(Z, m, n, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        branch, A, B, h, Z, m, n = ctx.saved_tensors
        wants_x, wants_z, _, wants_bias, *_ = ctx.needs_input_grad
        bias = dy.sum(0) if wants_bias else None
        dy, dm = (dy, None) if Z is None else magnified_backward(Z, m, n, dy)
        dh = dy @ B  # (tokens, rank)
        dx = ctx.weight.matmul_transposed(dy) if wants_x else None
        dz = dh @ A if wants_z else None
        if dx is not None and not ctx.dropped:
            dx.addmm_(dh, A)
        dA = (dh.T @ branch).to(ctx.types[0])
        dB = (h.T @ dy).to(ctx.types[1]).mul_(ctx.scale).T  # so it reads dy row by row: half the time of dyᵀ·h
        return dx, dz, None, bias, dA, dB, None, dm, None


class _Compiled(torch.autograd.Function):
    """The thin products in loops of ours, with A, B and h in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor | None,
        weight: FrozenWeight,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        m: Tensor | None,
        n: Tensor | None,
    ) -> Tensor:
        branch = x if z is None else z
        h, factor = kernels.low_rank(branch, A, B, scale)
        Z = weight.matmul(x, bias if m is None else None, (h, factor))
        ctx.save_for_backward(branch, A, h, factor, None if m is None else Z, m, n)
        ctx.weight, ctx.dropped, ctx.scale = weight, z is not None, scale
        return Z if m is None or n is None else magnified(Z, m, n, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        branch, A, h, factor, Z, m, n = ctx.saved_tensors
        wants_x, wants_z, _, wants_bias, *_ = ctx.needs_input_grad
        bias = dy.sum(0) if wants_bias else None
        dm = None
        if Z is None:
            dh, dA, dB = kernels.low_rank_backward(branch, h, dy, factor, ctx.scale)
        else:
            found = kernels.magnified_low_rank_backward(branch, h, Z, *wide(Z, m, n), dy, factor, ctx.scale)
            dh, dA, dB, dy, each = found
            dm = summed(each, m)
        dx = ctx.weight.matmul_transposed(dy, None if ctx.dropped else (dh, A)) if wants_x else None
        dz = kernels.low_rank_output(dh, A, None, dy.dtype) if wants_z else None
        return dx, dz, None, bias, dA, dB, None, dm, None
