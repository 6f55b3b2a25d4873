"""Cross-entropy over a vocabulary, a few rows at a time: what lies between logits and gradient stays in the cache.

PyTorch makes four tensors of the size of the logits, in fp32: the logits themselves, their logarithms of probabilities,
and the gradients of both. Here the gradient takes the place of the logits, and nothing else of that size is made.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from deltatune import kernels

_AT_ONCE = 2**18
"""Logits that are computed together: a megabyte in fp32."""


@torch.no_grad()
def cross_entropy_(logits: Float[Tensor, "rows classes"], targets: Int[Tensor, " rows"], units: int) -> float:
    """Σ (log Σ exp z − z_target) / units over rows z; its gradient, (softmax(z) − one-hot) / units, overwrites them.

    Computed in fp32 at least.
    """
    if kernels.ready(logits):
        return kernels.cross_entropy_(logits, targets, units).sum().item() / units
    wide = torch.promote_types(logits.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=logits.device)
    size = max(1, _AT_ONCE // logits.shape[1])
    for rows, wanted in zip(torch.split(logits, size), torch.split(targets[:, None], size), strict=True):
        z = rows.to(wide)
        right, highest = z.gather(1, wanted), z.amax(1, keepdim=True)
        sums = z.sub_(highest).exp_().sum(1, keepdim=True)
        total += (sums.log() + highest - right).sum()
        z.mul_(1 / (sums * units)).scatter_add_(1, wanted, torch.full_like(right, -1 / units))
        rows.copy_(z)
    return total.item() / units
