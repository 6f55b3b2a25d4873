"""The dynamic map: 8 bits for numbers that differ by orders of magnitude, in blocks that share one scale.

absmax = max |x| over a block      code = the level nearest to x/absmax      x ≈ level[code] · absmax

From 8-Bit Approximations for Parallelism in Deep Learning (arXiv 1511.04561), in blocks as in 8-bit Optimizers via
Block-wise Quantization (arXiv 2110.02861, §2). The levels are those of bitsandbytes.
"""

from functools import cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


@cache
def levels(signed: bool, device: torch.device) -> Float[Tensor, " 256"]:
    """The 256 levels from the lowest to 1, in fp32.

    For e = 0 … 6: the midpoints of linspace(0.1, 1, 2^e + 1), times 10^(e − 6), with both signs. Unsigned there are
    twice as many midpoints instead. 0 and 1 are added.
    """
    chosen = [0.0, 1.0]
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (e if signed else e + 1) + 1)
        middles = (10 ** (e - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        chosen += middles + [-middle for middle in middles if signed]
    return torch.tensor(sorted(chosen), dtype=torch.float32, device=device)


class Scratch:
    """Memory that encoding and decoding work in: new memory for each few blocks would take longer than the work."""

    def __init__(self, numbers: int, device: torch.device) -> None:
        self.magnitudes = torch.empty(numbers, device=device)
        self.halves = torch.empty(numbers, dtype=torch.float16, device=device)
        self.places = torch.empty(numbers, dtype=torch.int32, device=device)


def encode_(
    x: Float[Tensor, "blocks block"],
    codes: UInt8[Tensor, "blocks block"],
    absmax: Float[Tensor, " blocks"],
    scratch: Scratch,
    *,
    signed: bool,
) -> None:
    """Puts the code of each fp32 number and the scale of each block into `codes` and `absmax`; overwrites `x`.

    x/absmax is rounded to fp16, so that a table has its code: searching for it takes many times as long. That
    moves the boundaries between levels by at most 7% of a level's width. The unsigned map is for second moments, by
    whose root one divides: nothing becomes 0 there, but the least level above it, unless its whole block is 0.
    """
    magnitudes, halves = (part[: x.numel()].view(x.shape) for part in (scratch.magnitudes, scratch.halves))
    places = scratch.places[: x.numel()]
    torch.amax(torch.abs(x, out=magnitudes) if signed else x, 1, out=absmax)
    halves.copy_(x.div_(absmax[:, None]))
    places.copy_(halves.view(-1).view(torch.uint16))
    torch.index_select(_codes(signed, x.device), 0, places, out=codes.view(-1))


def decode_(
    codes: UInt8[Tensor, "blocks block"],
    absmax: Float[Tensor, " blocks"],
    out: Float[Tensor, "blocks block"],
    scratch: Scratch,
    *,
    signed: bool,
) -> Float[Tensor, "blocks block"]:
    """Puts the numbers that codes and scales stand for into `out`, which is fp32, and returns it."""
    places = scratch.places[: codes.numel()].copy_(codes.view(-1))
    table = levels(signed, codes.device).view(torch.int32)  # integers are looked up faster than floats
    torch.index_select(table, 0, places, out=out.view(-1).view(torch.int32))
    return out.mul_(absmax[:, None])


@cache
def _codes(signed: bool, device: torch.device) -> UInt8[Tensor, " 65536"]:
    """The code of each of the 65,536 bit patterns of fp16; of two levels as near the lower, for NaN (0/0) that of 0."""
    level = levels(signed, torch.device("cpu"))
    numbers = torch.arange(1 << 16).to(torch.uint16).view(torch.float16).float().nan_to_num(0.0)
    codes = torch.bucketize(numbers, (level[:-1] + level[1:]) / 2)
    return codes.clamp(min=0 if signed else 1).to(torch.uint8).to(device)
