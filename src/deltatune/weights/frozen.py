"""The interface of a frozen linear weight: what a method may ask of it, whatever its storage.

y = x·Wᵀ + b      W is (out, in), x is (tokens, in), y is (tokens, out)
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable

from jaxtyping import Float
from torch import Tensor


class FrozenWeight(ABC):
    """A linear weight W (out, in) that gets no gradient; products are computed in the type of their input."""

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

    @abstractmethod
    def matmul(
        self,
        x: Float[Tensor, "tokens in"],
        bias: Float[Tensor, " out"] | None = None,
        onto: Float[Tensor, "tokens out"] | None = None,
    ) -> Float[Tensor, "tokens out"]:
        """x·Wᵀ + bias: the forward product. Or `onto`, of the type of x, with x·Wᵀ alone added in its place."""

    @abstractmethod
    def matmul_transposed(
        self, g: Float[Tensor, "tokens out"], onto: Float[Tensor, "tokens in"] | None = None
    ) -> Float[Tensor, "tokens in"]:
        """g·W: the product that carries a gradient back to the input. Or `onto` with it added in its place."""

    @abstractmethod
    def dense(self) -> Float[Tensor, "out in"]:
        """W as an ordinary tensor: the stored one where there is one, otherwise a decoded copy."""

    @abstractmethod
    def row_norms(self) -> Float[Tensor, " out"]:
        """‖W_j‖₂ of each row, in fp32; in fp64 where W is."""

    @abstractmethod
    def write(self, weight: Float[Tensor, "out in"]) -> None:
        """Replaces the stored values by `weight`, rounded to the storage."""
