"""y = m/n ⊙ (x·Wᵀ + s·(z·Aᵀ)·Bᵀ) + b where the product itself finds n, the norm of each row of W + s·B·A.

Liu et al. 2024, arXiv 2402.09353, equations 5 and 11: n is held constant. Where a panel of W is in a cache to be
multiplied with, its norms cost what a few tokens more would, and m/n costs no pass over what the product gives. What
goes back needs no product before m/n either: with u = y − b and h = z·Aᵀ

    dh = (m/n ⊙ dy)·(s·B)      dx = (m/n ⊙ dy)·W (+ dh·A)      dz = dh·A
    dA = dhᵀ·z      dB = s·m/n ⊙ (dyᵀ·h)      dm = Σ dy ⊙ u / m      db = Σ dy

where m/n stands with s·B, with the rows of W and with dyᵀ·h, which are all smaller than dy.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from deltatune import kernels
from deltatune.weights import FrozenWeight


def decomposed(
    x: Float[Tensor, "tokens in"],
    z: Float[Tensor, "tokens in"] | None,
    weight: FrozenWeight,
    bias: Float[Tensor, " out"] | None,
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    scale: float,
    m: Float[Tensor, " out"],
    squares: Float[Tensor, " out"],
) -> Float[Tensor, "tokens out"] | None:
    """y in the type of x; z is the dropped input, or x itself when it is None, and `squares` are ‖W_j‖².

    Kept for backward: z, h, A, u, and of the size of B and m what stands with these. None where the processor has no
    such product, for high ranks, and where something in m is zero, so that u does not tell what it was multiplied with.
    """
    factor = weight.factor(x)
    if factor is None or len(A) > kernels.HIGHEST_RANK or {one.dtype for one in (A, B, m, squares)} != {torch.float32}:
        return None
    branch = x if z is None else z
    with torch.no_grad():
        h, F = kernels.low_rank(branch, A, B, scale)
        found = kernels.magnified_product(x, factor, (h, F), A, m, squares)
    if found is None:
        return None
    y: Tensor = _Decomposed.apply(x, z, weight, bias, A, B, scale, m, h, found)  # type: ignore[no-untyped-call]
    return y


class _Decomposed(torch.autograd.Function):
    """Takes what the product gave for its output."""

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
        m: Tensor,
        h: Tensor,
        found: kernels.Magnified,
    ) -> Tensor:
        ctx.save_for_backward(x if z is None else z, h, A, m, *found)
        ctx.weight, ctx.dropped, ctx.scale = weight, z is not None, scale
        return found.y if bias is None else found.y + bias.to(found.y.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        branch, h, A, m, *found = ctx.saved_tensors
        wants_x, wants_z, _, wants_bias, *_ = ctx.needs_input_grad
        found = kernels.Magnified(*found)
        dh, dA, dB, dm = kernels.scaled_low_rank_backward(branch, h, found, m, dy, ctx.scale)
        update = None if ctx.dropped else (dh, A)
        dx = ctx.weight.matmul_transposed(dy, update, found.scales) if wants_x else None
        dz = kernels.low_rank_output(dh, A, None, dy.dtype) if wants_z else None
        return dx, dz, None, dy.sum(0) if wants_bias else None, dA, dB, None, dm, None, None
