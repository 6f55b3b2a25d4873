"""The numbers that codes of a few bits stand for, before they are multiplied by the scale of their block."""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""NormalFloat of four bits as published (Dettmers et al. 2023, arXiv 2305.14314, appendix E)."""

_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
"""The positive half of the four-bit float, by code; 12 becomes 1."""


@lru_cache
def levels(format: str) -> Float[Tensor, " codes"]:
    """The level of each code of nf4, fp4, nf3 or nf2, in fp32."""
    if format == "nf4":
        return torch.tensor(NF4)
    if format == "fp4":
        half = torch.tensor(_FP4)
        return torch.cat((half, -half)) / 12
    return normal_float({"nf3": 3, "nf2": 2}[format])


def normal_float(bits: int) -> Float[Tensor, " codes"]:
    """NormalFloat of any width: quantiles of the normal distribution, zero among them, the largest of them 1.

    The construction behind the published levels of NF4: with K = 2^bits and the tail δ = ½·(1/2K + 1/(2K − 2)), the
    positive levels are the K/2 quantiles at even steps from 1 − δ down to ½, ½ itself left out; the negative ones are
    K/2 − 1 such quantiles with their sign turned; the last is zero. For four bits that gives `NF4` up to 2·10⁻⁷.
    """
    codes = 2**bits
    tail = (1 / (2 * codes) + 1 / (2 * codes - 2)) / 2

    def quantiles(count: int) -> Tensor:
        found: Tensor = torch.special.ndtri(torch.linspace(1 - tail, 0.5, count + 1, dtype=torch.float64)[:-1])
        return found

    every = torch.cat((-quantiles(codes // 2 - 1), torch.zeros(1, dtype=torch.float64), quantiles(codes // 2)))
    return (every / every.max()).sort().values.float()
