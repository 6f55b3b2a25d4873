"""y = m/n ⊙ Z + b: a trained magnitude of what a product gives, and its gradients.

Liu et al. 2024, arXiv 2402.09353, equations 5 and 11: n, the norm, is held constant. Backward:

    dZ = m/n ⊙ dy      dm = Σ dy ⊙ Z / n      db = Σ dy

m and n are (out,), or (1,) for all columns together. In 16 bits the factor, near 1, would lose what was learnt, so it
stays in 32.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from deltatune import kernels


def magnified(
    Z: Float[Tensor, "tokens out"],
    m: Float[Tensor, " magnitudes"],
    n: Float[Tensor, " magnitudes"],
    bias: Float[Tensor, " out"] | None,
) -> Float[Tensor, "tokens out"]:
    """m/n ⊙ Z + b in the type of Z.

    Without `kernels` that is batch normalisation with mean 0 and variance 1: of PyTorch's operations the one that has
    both in one pass.
    """
    if _compiled(Z, m, n):
        return kernels.scale_columns(Z, *wide(Z, m, n), None if bias is None else bias.to(m.dtype))
    factor = (m / n).to(torch.promote_types(Z.dtype, torch.float32)).expand(Z.shape[1]).contiguous()
    mean, variance = torch.zeros_like(factor), torch.ones_like(factor)
    bias = None if bias is None else bias.to(factor.dtype)
    return F.batch_norm(Z, mean, variance, factor, bias, eps=0.0)


def magnified_backward(
    Z: Float[Tensor, "tokens out"],
    m: Float[Tensor, " magnitudes"],
    n: Float[Tensor, " magnitudes"],
    dy: Float[Tensor, "tokens out"],
) -> tuple[Float[Tensor, "tokens out"], Float[Tensor, " magnitudes"]]:
    """dZ and dm."""
    if _compiled(Z, m, n):
        dZ, dm = kernels.scale_columns_backward(Z, *wide(Z, m, n), dy)
    else:
        dZ, dm = magnified(dy, m, n, None), (dy * Z).sum(0).to(n.dtype) / n
    return dZ, summed(dm, m)


def summed(each: Float[Tensor, " out"], m: Float[Tensor, " magnitudes"]) -> Float[Tensor, " magnitudes"]:
    """The gradient of m from those of each column."""
    return each if each.shape == m.shape else each.sum(0, keepdim=True)


def wide(
    Z: Float[Tensor, "tokens out"], m: Float[Tensor, " magnitudes"], n: Float[Tensor, " magnitudes"]
) -> tuple[Float[Tensor, " out"], Float[Tensor, " out"]]:
    """m and n, one for each column."""
    return (m, n) if m.shape == Z.shape[1:] else (m.expand(Z.shape[1]), n.expand(Z.shape[1]))


def _compiled(Z: Tensor, m: Tensor, n: Tensor) -> bool:
    return kernels.ready(Z) and m.dtype == n.dtype == torch.float32
