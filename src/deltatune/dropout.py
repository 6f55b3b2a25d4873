"""Dropout from random bits: on a CPU more than twice as fast as PyTorch's, which draws one float for each element.

Srivastava et al. 2014, JMLR 15. Each element is zeroed with probability p, to within 2⁻¹⁶, and the others are scaled by
1 / (1 − p). Draws from PyTorch's own generator, so seeds and gradient checkpointing work as with `nn.Dropout`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from deltatune import kernels

_LANES = 2**16
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


Mask = Bool[Tensor, "..."] | int
"""Which elements of a tensor stay: truth values, or the seed that `kernels.drop` draws them from, again and again."""


def dropout(x: Float[Tensor, "*shape"], p: float) -> Float[Tensor, "*shape"]:
    """The elements of x, each zeroed with probability p."""
    if x.device.type != "cpu" and not kernels.ready(x):
        return F.dropout(x, p)
    y: Tensor = _Dropped.apply(x, draw(x.shape, p, x), p)  # type: ignore[no-untyped-call]
    return y


def draw(shape: Sequence[int], p: float, like: Tensor) -> Mask:
    """A mask of that shape, for tensors of the type and on the device of `like`, in which each stays with 1 − p."""
    if not kernels.ready(like):
        return kept(shape, p, like.device)
    return 0 if like.is_meta else int(torch.empty((), dtype=torch.int64).random_())


def dropped(x: Float[Tensor, "*shape"], mask: Mask, p: float) -> Float[Tensor, "*shape"]:
    """x / (1 − p) where it stays, 0 elsewhere.

    Without a kernel its bits are masked: to make floats of truth values takes longer than all the rest.
    """
    if isinstance(mask, int):
        return kernels.drop(x, p, mask)
    bits = _BITS[x.itemsize]
    stays = mask.view(torch.int8).neg().to(bits)  # all bits or none
    return stays.bitwise_and_(x.view(bits)).view(x.dtype).mul_(1 / (1 - p))


class _Dropped(torch.autograd.Function):
    """`dropped`, which keeps no more than the mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Mask, p: float) -> Tensor:
        ctx.mask, ctx.p = mask, p
        return dropped(x, mask, p)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return dropped(gradient, ctx.mask, ctx.p), None, None


def kept(shape: Sequence[int], p: float, device: torch.device | str = "cpu") -> Bool[Tensor, "..."]:
    """Which elements of a tensor of that shape stay, each with probability 1 − p."""
    if torch.device(device).type != "cpu":
        return torch.rand(*shape, device=device) >= p
    count = math.prod(shape)
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    lanes = words.view(torch.int16)[:count].view(*shape)  # uniform in [−2¹⁵, 2¹⁵)
    return lanes >= round(p * _LANES) - _LANES // 2


class Dropout(nn.Dropout):
    """`nn.Dropout` that uses `dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        """Input of any shape → the same shape; in evaluation the input itself."""
        return dropout(input, self.p) if self.training and self.p > 0 else input


def replace_dropout(model: nn.Module) -> None:
    """Puts `Dropout` in the place of every plain `nn.Dropout` of the model."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Dropout and path:
            model.set_submodule(path, Dropout(module.p).train(module.training))
