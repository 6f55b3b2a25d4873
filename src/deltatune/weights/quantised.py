"""A linear layer whose frozen weight is stored in fewer bits, and that weight as methods see it.

The codes and scales are buffers. What is computed with is decoded when it is needed, in the type of the input, into
memory that the next decoding uses again; for the backward pass nothing is kept but the codes.
"""

import math
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.pytorch_utils import Conv1D

from deltatune import kernels
from deltatune.weights.codec import Packed, aligned, codes_of, decode, encode
from deltatune.weights.frozen import FrozenWeight, linear
from deltatune.weights.storage import DENSE, Storage

_ROWS = 1 << 20
"""Numbers, roughly, that are decoded at a time where a part of the rows is enough."""


class QuantisedLinear(nn.Module):
    """A frozen linear layer with its weight in a `Storage`; the bias is an ordinary parameter.

    It takes the place of an `nn.Linear`, or (`transposed`) of a `Conv1D`, whose weight is turned to (out, in) first.
    Casting the module leaves the stored numbers alone; it changes `dtype`, in which `dense_layer` gives the weight.
    """

    codes: Tensor
    scales: Tensor | None
    coarse: Tensor | None
    offset: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        storage: Storage,
        *,
        bias: bool = True,
        transposed: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.storage, self.transposed = storage, transposed
        self.dtype = torch.float32
        layout = storage.layout(in_features * out_features)
        for name in Packed._fields:
            shape, dtype = layout.get(name, ((), None))
            self.register_buffer(name, None if dtype is None else torch.empty(shape, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None

    @classmethod
    def of(cls, layer: nn.Module, storage: Storage, weight: Tensor | None = None) -> "QuantisedLinear":
        """An `nn.Linear` or `Conv1D` with its weight stored so; `weight` stands in for the layer's own.

        The bias is the very parameter of the layer. Raises `UserError` where a value of the weight is not finite.
        """
        transposed = isinstance(layer, Conv1D)
        own = cast(Tensor, layer.weight)
        weight = own if weight is None else weight
        weight = weight.detach().T if transposed else weight.detach()  # (out, in)
        made = cls(weight.shape[1], weight.shape[0], storage, bias=False, transposed=transposed, device="meta")
        made.store(encode(weight, storage))
        made.bias = cast(nn.Parameter | None, layer.bias)
        made.dtype = own.dtype
        return made.train(layer.training)

    @property
    def packed(self) -> Packed:
        """The tensors that store the weight."""
        return Packed(self.codes, self.scales, self.coarse, self.offset)

    def store(self, packed: Packed) -> None:
        """Takes other tensors of the same layout for its own."""
        for name, tensor in packed._asdict().items():
            setattr(self, name, tensor)

    @property
    def weight(self) -> Tensor:
        """A stand-in with the shape, type and device that the ordinary layer's weight has, and no number in it."""
        shape = (self.out_features, self.in_features)
        empty = torch.full((), math.nan, dtype=self.dtype, device=self.codes.device)
        empty = empty.expand(shape[::-1] if self.transposed else shape)
        empty._is_hf_initialized = True  # type: ignore[attr-defined]  # Transformers is not to write to it
        return empty

    def dense_layer(
        self, weight: Float[Tensor, "out in"] | None = None, bias: Float[Tensor, " out"] | None = None
    ) -> nn.Linear | Conv1D:
        """The ordinary layer in `dtype`, frozen: with that weight and bias, else the decoded weight and its bias."""
        weight = (QuantisedWeight(self).dense() if weight is None else weight).to(self.dtype)
        with torch.device("meta"):
            shape = (self.in_features, self.out_features)
            layer = Conv1D(*shape[::-1]) if self.transposed else nn.Linear(*shape, bias=False)
        weight = weight.T if self.transposed else weight
        layer.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)
        bias = self.bias if bias is None else bias
        layer.bias = (
            None if bias is None else nn.Parameter(bias.detach().to(self.dtype, copy=True), requires_grad=False)
        )
        return layer.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out). Under autocast, in its type."""
        return linear(x, QuantisedWeight(self), self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantisedLinear":
        """Moves what is stored with the module, and casts none of it."""
        before = self.packed
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before._asdict().items():
            moved = getattr(self, name)
            if moved is not None and moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=before.codes.device)).dtype
        return self

    def extra_repr(self) -> str:
        """As of `nn.Linear`, and the storage."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.storage}"


class QuantisedWeight(FrozenWeight):
    """The weight of a `QuantisedLinear`, decoded at each use; fulfils `FrozenWeight`."""

    _module: QuantisedLinear

    @property
    def out(self) -> int:
        """Output features: rows of W."""
        return self._module.out_features

    @property
    def in_(self) -> int:
        """Input features: columns of W."""
        return self._module.in_features

    @property
    def nbytes(self) -> int:
        """Bytes that codes and scales take together."""
        return sum(tensor.nbytes for tensor in self._module.packed if tensor is not None)

    @property
    def version(self) -> Hashable:
        """Which memory holds codes and scales, and how often it was written to."""
        stored = [tensor for tensor in self._module.packed if tensor is not None]
        if any(tensor.is_inference() for tensor in stored):  # such a tensor does not count
            return object()
        return tuple(
            (StorageWeakRef(tensor.untyped_storage()), tensor._version)  # type: ignore[no-untyped-call]
            for tensor in stored
        )

    @torch.no_grad()
    def read(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """W in that type, where it has to be decoded in memory that the next decoding overwrites."""
        if (stored := self._stored) is not None:
            return stored.to(dtype)
        flat = _scratch(self.out * self.in_, dtype, self._module.codes.device)
        return decode(self._module.packed, self._module.storage, flat).view(self.out, self.in_)

    def factor(self, x: Float[Tensor, "tokens inner"], turned: bool = False) -> kernels.Factor | None:
        """The codes of W, or (`turned`) of its transpose, where the products of `kernels` take them."""
        if not self._quick:
            return None
        if (stored := self._stored) is not None:
            weight = stored.T if turned else stored
            return weight if kernels.multiplies(x, weight) else None
        if not kernels.multiplies_codes(x, self.out, self.in_):
            return None
        codes = codes_of(self._module.packed, self._module.storage)
        return kernels.Coded(codes, self.in_ if turned else self.out, turned)

    @torch.no_grad()
    def dense(self) -> Float[Tensor, "out in"]:
        """W decoded in fp32; the stored tensor itself where the numbers are stored as they are."""
        if (stored := self._stored) is not None:
            return stored
        codes = self._module.codes
        whole = torch.empty(self.out * self.in_, dtype=torch.float32, device=codes.device)
        return decode(self._module.packed, self._module.storage, whole).view(self.out, self.in_)

    @torch.no_grad()
    def row_norms(self) -> Float[Tensor, " out"]:
        """‖W_j‖₂ of each row, in fp32; a part of the rows is decoded at a time."""
        step = aligned(self._module.storage)
        rows = step // math.gcd(step, self.in_)
        rows *= max(1, _ROWS // (rows * self.in_))
        norms = []
        for first in range(0, self.out, rows):
            count = min(rows, self.out - first)
            part = _scratch(count * self.in_, torch.float32, self._module.codes.device)
            decode(self._module.packed, self._module.storage, part, first * self.in_)
            norms.append(torch.linalg.vector_norm(part.view(count, self.in_), dim=1))
        return torch.cat(norms)

    @torch.no_grad()
    def write(self, weight: Float[Tensor, "out in"]) -> None:
        """Encodes `weight` in place of the stored one."""
        for old, new in zip(self._module.packed, encode(weight, self._module.storage), strict=True):
            if old is not None and new is not None:
                old.copy_(new)

    @property
    def _stored(self) -> Tensor | None:
        dense = self._module.storage.format in DENSE
        return self._module.codes.view(self.out, self.in_) if dense else None


_memory = threading.local()


def _scratch(numel: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " numbers"]:
    """Memory of this thread for one decoded weight, as large as the largest so far; fresh memory would cost more."""
    kept = _kept()
    size = numel * dtype.itemsize
    if device not in kept or kept[device].numel() < size:
        kept.pop(device, None)
        with torch.inference_mode(False):  # what is made within that mode can be written to within it alone
            kept[device] = torch.empty(size, dtype=torch.uint8, device=device)
    return kept[device][:size].view(dtype)


def _kept() -> dict[torch.device, Tensor]:
    kept: dict[torch.device, Tensor] = _memory.__dict__.setdefault("kept", {})
    return kept


@contextmanager
def scratch_apart() -> Iterator[None]:
    """Within the block this thread decodes into other memory, which is gone after it."""
    before = _kept()
    _memory.kept = {}
    try:
        yield
    finally:
        _memory.kept = before
