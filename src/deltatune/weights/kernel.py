"""Decoding four bits on CUDA with bitsandbytes' operator, where that package is installed.

It computes level · scale in fp32 and rounds once, as `codec` does: the same bits. It is used after it gave what it
should on the device. On a CPU `kernels.decode` does the same for every format.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from deltatune.weights.levels import levels

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_BLOCK = 64

Kernel = Callable[[Tensor, Tensor, Tensor, int], None]
"""Fills its third argument from codes and fp32 scales in blocks of so many numbers, of which it has whole ones."""


def decode_blocks(
    format: str,
    codes: Integer[Tensor, " bytes"],
    scales: Float[Tensor, " blocks"],
    out: Float[Tensor, " numbers"],
    block: int,
) -> int:
    """Decodes the whole blocks that fit into `out`, and returns how many numbers these are: 0 where it has no kernel.

    Codes and scales begin where `out` does.
    """
    count = len(out) // block * block if out.is_cuda and out.is_contiguous() and block in _BLOCKS else 0
    kernel = _kernel(format, out.dtype, out.device) if count else None
    if kernel is None:
        return 0
    kernel(codes, scales, out[:count], block)
    return count


@lru_cache
def _kernel(format: str, dtype: torch.dtype, device: torch.device) -> Kernel | None:
    """The kernel that decodes that format to that type on that device; None where there is none that does."""
    if format not in ("nf4", "fp4") or dtype not in _TYPES:
        return None
    kernel = _operator(format, dtype)
    return kernel if kernel and _decodes(kernel, format, dtype, device) else None


def _operator(format: str, dtype: torch.dtype) -> Kernel | None:
    """The package's operator, which importing it registers."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return None
    operator = torch.ops.bitsandbytes.dequantize_4bit

    def kernel(codes: Tensor, scales: Tensor, out: Tensor, block: int) -> None:
        used = codes[: len(out) // 2], scales[: len(out) // block]
        out.copy_(operator(*used, block, format, list(out.shape), dtype).view_as(out))

    return kernel


def _decodes(kernel: Kernel, format: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether it gives each pair of codes its levels, times the scale of their block."""
    codes, scales = torch.arange(256).to(torch.uint8), torch.linspace(0.001, 3.7, 512 // _BLOCK)
    pairs = torch.stack((codes >> 4, codes & 15), 1).view(-1, _BLOCK).int()
    out = torch.full((512,), torch.nan, dtype=dtype, device=device)
    kernel(codes.to(device), scales.to(device), out, _BLOCK)
    return torch.equal(out.cpu(), (levels(format)[pairs] * scales[:, None]).to(dtype).view(-1))
