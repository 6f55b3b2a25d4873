"""Compacter's down projection, forward and backward: the matrix made whole, against products with its factors.

python benchmarks/kronecker.py

Medians of 1,024 tokens in milliseconds, the two taking turns, n = 4 and rank 1. The products: t with each n-th of h,
the small factors across the parts, s with what comes of it.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from deltatune.methods.compacter import sum_of_products

N, TOKENS = 4, 1024


def whole(h: Tensor, A: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """What `compacter` does."""
    return h @ sum_of_products(A, s, t).to(h.dtype).T


def by_factors(h: Tensor, A: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """The same without the matrix."""
    A, s, t = A.to(h.dtype), s.to(h.dtype), t.to(h.dtype)
    small = (h.reshape(TOKENS * N, -1) @ t[:, 0].T).view(TOKENS, N, N)  # (tokens, part b, term i)
    mixed = torch.einsum("tbi,iab->tai", small, A)
    return (mixed.reshape(TOKENS * N, N) @ s[:, :, 0]).view(TOKENS, -1)


def milliseconds(way: Callable[..., Tensor], outward: Tensor, *given: Tensor) -> float:
    """Of one forward and backward pass."""
    began = time.perf_counter()
    torch.autograd.grad(way(*given), given, outward)
    return 1000 * (time.perf_counter() - began)


for d, m in ((384, 12), (768, 24), (2048, 64)):
    for dtype in (torch.bfloat16, torch.float32):
        h, outward = torch.randn(TOKENS, d, dtype=dtype, requires_grad=True), torch.randn(TOKENS, m, dtype=dtype)
        A, s, t = torch.randn(N, N, N), torch.randn(N, m // N, 1), torch.randn(N, 1, d // N)
        given = (h, *(factor.requires_grad_() for factor in (A, s, t)))
        one, other = whole(*given), by_factors(*given)
        assert (one - other).abs().max() < (1e-4 if dtype == torch.float32 else 5e-2) * one.abs().max()
        rounds = [(milliseconds(whole, outward, *given), milliseconds(by_factors, outward, *given)) for _ in range(60)]
        formed, factored = (statistics.median(times) for times in zip(*rounds[10:], strict=True))
        print(f"d {d:5} m {m:3} {dtype}: whole {formed:.2f}, factors {factored:.2f}", flush=True)
