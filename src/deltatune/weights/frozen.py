"""The interface of a frozen linear weight: what a method may ask of it, whatever its storage.

y = x·Wᵀ + b      W is (out, in), x is (tokens, in), y is (tokens, out)
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deltatune import kernels

Update = tuple[Tensor, Tensor]
"""h and F of a low-rank update h·F in fp32, as `kernels.low_rank` makes them."""


QUICK = "quick_products"
"""The attribute that a module has where its products are to be our own (`models.products`)."""


class FrozenWeight(ABC):
    """A linear weight W (out, in) that gets no gradient; products are computed in the type of their input.

    They are PyTorch's, or where the module has the mark `QUICK` those of `kernels` that take the tensors.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        self._quick = QUICK in vars(module)

    @property
    @abstractmethod
    def out(self) -> int:
        """Output features: rows of W."""

    @property
    @abstractmethod
    def in_(self) -> int:
        """Input features: columns of W."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the stored weight takes."""

    @property
    @abstractmethod
    def version(self) -> Hashable:
        """Another one whenever the stored values may have changed: what was computed from them is good until then."""

    def matmul(
        self, x: Float[Tensor, "tokens in"], bias: Float[Tensor, " out"] | None = None, update: Update | None = None
    ) -> Float[Tensor, "tokens out"]:
        """x·Wᵀ + h·F + bias: the forward product. `update`, if there is one, is h (tokens, rank) and F (rank, out)."""
        return self._product(x, False, None if bias is None else bias.to(x.dtype), update)

    def matmul_transposed(
        self,
        g: Float[Tensor, "tokens out"],
        update: Update | None = None,
        scales: Float[Tensor, " out"] | None = None,
    ) -> Float[Tensor, "tokens in"]:
        """g·W + h·F: the product that carries a gradient back to the input. F is (rank, in) here.

        With `scales` (out,) in fp32 it is (g ⊙ scales)·W.
        """
        return self._product(g, True, None, update, scales)

    def _product(
        self,
        x: Float[Tensor, "tokens inner"],
        turned: bool,
        bias: Float[Tensor, " outer"] | None,
        update: Update | None,
        scales: Float[Tensor, " inner"] | None = None,
    ) -> Float[Tensor, "tokens outer"]:
        """The product with W, or (`turned`) with its transpose."""
        if (factor := self.factor(x, turned)) is not None:
            return kernels.product(x, factor, bias, update, scales)
        weight = self.read(x.dtype)
        weight = weight.T if turned else weight
        if scales is not None:
            x = (x * scales).to(x.dtype)
        if update is None:
            return x @ weight.T if bias is None else F.linear(x, weight, bias)
        return kernels.low_rank_output(*update, bias, x.dtype).addmm_(x, weight.T)

    @abstractmethod
    def factor(self, x: Float[Tensor, "tokens inner"], turned: bool = False) -> kernels.Factor | None:
        """W, or (`turned`) its transpose, as the products of `kernels` with x take it; None where they do not."""

    @abstractmethod
    def read(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """W in that type for one product: the next one that is read can lie in the same memory."""

    def stored_in(self, dtype: torch.dtype) -> bool:
        """Whether it is stored in that type, so that what is read in it stays."""
        return False

    @abstractmethod
    def dense(self) -> Float[Tensor, "out in"]:
        """W as an ordinary tensor: the stored one where there is one, otherwise a decoded copy."""

    @abstractmethod
    def row_norms(self) -> Float[Tensor, " out"]:
        """‖W_j‖₂ of each row, in fp32; in fp64 where W is."""

    @abstractmethod
    def write(self, weight: Float[Tensor, "out in"]) -> None:
        """Replaces the stored values by `weight`, rounded to the storage."""


def linear(
    x: Float[Tensor, "*shape in"], weight: FrozenWeight, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "*shape out"]:
    """x·Wᵀ + b. Under autocast, in its type."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
    if not torch.is_grad_enabled():
        return weight.matmul(flat, bias).view(*x.shape[:-1], -1)
    y: Tensor = _Linear.apply(flat, bias, weight)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """y = x·Wᵀ + b.   Backward:   dx = dy·W,  db = Σ dy.   Nothing is kept but the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: FrozenWeight) -> Tensor:
        ctx.weight = weight
        return weight.matmul(x, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wants_x, wants_bias, _ = ctx.needs_input_grad
        dx = ctx.weight.matmul_transposed(dy) if wants_x else None
        return dx, dy.sum(0) if wants_bias else None, None
