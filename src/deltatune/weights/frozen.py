"""The interface of a frozen linear weight: what a method may ask of it, whatever its storage.

y = x·Wᵀ + b      W is (out, in), x is (tokens, in), y is (tokens, out)
"""

from collections.abc import Hashable
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltatune.weights.dense import DenseWeight
from deltatune.weights.quantised import QuantisedLinear, QuantisedWeight


@runtime_checkable
class FrozenWeight(Protocol):
    """A linear weight W (out, in) that gets no gradient; products are computed in the type of their input."""

    @property
    def out(self) -> int:
        """Output features: rows of W."""

    @property
    def in_(self) -> int:
        """Input features: columns of W."""

    @property
    def nbytes(self) -> int:
        """Bytes that the stored weight takes."""

    @property
    def version(self) -> Hashable:
        """Another one whenever the stored values may have changed: what was computed from them is good until then."""

    def matmul(
        self, x: Float[Tensor, "tokens in"], bias: Float[Tensor, " out"] | None = None
    ) -> Float[Tensor, "tokens out"]:
        """x·Wᵀ + bias: the forward product."""

    def matmul_transposed(self, g: Float[Tensor, "tokens out"]) -> Float[Tensor, "tokens in"]:
        """g·W: the product that carries a gradient back to the input."""

    def dense(self) -> Float[Tensor, "out in"]:
        """W as an ordinary tensor: the stored one where there is one, otherwise a decoded copy."""

    def row_norms(self) -> Float[Tensor, " out"]:
        """‖W_j‖₂ of each row, in fp32; in fp64 where W is."""

    def write(self, weight: Float[Tensor, "out in"]) -> None:
        """Replaces the stored values by `weight`, rounded to the storage."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one that holds a linear weight we can adapt, in whatever storage."""
    return isinstance(module, nn.Linear | Conv1D | QuantisedLinear)


def is_transposed(module: nn.Module) -> bool:
    """Whether the ordinary form of a linear layer has its weight as (in, out): that of Transformers' `Conv1D`."""
    return isinstance(module, Conv1D) or (isinstance(module, QuantisedLinear) and module.transposed)


def weight_of(module: nn.Module) -> FrozenWeight:
    """The frozen weight that a linear module or an embedding holds; it follows the module when that is moved or cast.

    An embedding is a linear map of one-hot vectors: its W is (width, vocabulary).
    """
    if isinstance(module, Conv1D | nn.Embedding):
        return DenseWeight(module, transposed=True)
    if isinstance(module, nn.Linear):
        return DenseWeight(module, transposed=False)
    if isinstance(module, QuantisedLinear):
        return QuantisedWeight(module)
    raise TypeError(f"{type(module).__name__} holds no weight that can be adapted")
