"""A weight stored in fp32 or bf16: (out, in) as in `nn.Linear`, or (in, out) as in GPT-2's `Conv1D` and embeddings."""

from collections.abc import Hashable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from deltatune import kernels
from deltatune.weights.frozen import FrozenWeight


class DenseWeight(FrozenWeight):
    """The weight of an `nn.Linear`, or (`transposed`) of a `Conv1D` or `nn.Embedding`, read at each use."""

    def __init__(self, module: nn.Module, transposed: bool) -> None:
        super().__init__(module)
        self._transposed = transposed

    @property
    def _stored(self) -> Tensor:
        weight = self._module.weight
        assert isinstance(weight, Tensor)
        return weight.detach() if weight.requires_grad else weight

    @property
    def out(self) -> int:
        """Output features: rows of W."""
        return self.dense().shape[0]

    @property
    def in_(self) -> int:
        """Input features: columns of W."""
        return self.dense().shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that the stored weight takes."""
        return self._stored.nbytes

    @property
    def version(self) -> Hashable:
        """Which storage it is, and how often it was written to."""
        stored = self._stored
        if stored.is_inference():  # such a tensor does not count
            return object()
        # A weak reference: the memory can be freed, but no other storage is then taken for this one.
        return StorageWeakRef(stored.untyped_storage()), stored._version  # type: ignore[no-untyped-call]

    def read(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """W in that type."""
        return self.dense().to(dtype)

    def factor(self, x: Float[Tensor, "tokens inner"], turned: bool = False) -> kernels.Factor | None:
        """W, or (`turned`) its transpose, where the products of `kernels` take it."""
        if not self._quick:
            return None
        weight = self.dense()
        weight = weight.T if turned else weight
        return weight if kernels.multiplies(x, weight) else None

    def stored_in(self, dtype: torch.dtype) -> bool:
        """Whether it has that type."""
        return self._stored.dtype == dtype

    def dense(self) -> Float[Tensor, "out in"]:
        """W as a view of the stored tensor; writing to it writes to the base."""
        return self._stored.T if self._transposed else self._stored

    def row_norms(self) -> Float[Tensor, " out"]:
        """‖W_j‖₂ of each row, in fp32; in fp64 where W is."""
        weight = self.dense()
        wide = torch.promote_types(weight.dtype, torch.float32)
        norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=wide)
        return norms

    def write(self, weight: Float[Tensor, "out in"]) -> None:
        """Copies `weight` over the stored values, rounded to their type."""
        self.dense().copy_(weight)
