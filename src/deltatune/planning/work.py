"""What a step does, operation by operation: what ran, how often, and which bytes lived."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltatune import kernels


class Work(NamedTuple):
    """One operation and the sizes that decide what it costs."""

    name: str
    """Such as mm, or native_layer_norm."""
    dtype: torch.dtype
    """Of its largest tensor."""
    shape: tuple[int, ...]
    """Of a product (batch, m, k, n): (batch, m, k) · (batch, k, n). Of anything else the numbers that it writes."""
    nbytes: int
    """Bytes that it reads and writes."""


@dataclass
class Traced:
    """What a trace saw."""

    work: Counter[Work] = field(default_factory=Counter)
    """How often each operation ran. Views of what is there are not counted."""
    peak: float = 0.0
    """Most bytes that were alive at once; what was there before the trace is left out."""
    forward: float = 0.0
    """Bytes that were alive when the backward pass began: what is kept for it."""
    calls: float = 0.0
    """Operations in all, views among them."""
    kept: Counter[str] = field(default_factory=Counter)
    """Bytes that lived when the backward pass began, by the module that made them; empty where nobody asked."""

    @property
    def flops(self) -> float:
        """Of the products, a multiplication and an addition being two."""
        return sum(count * 2 * math.prod(work.shape) for work, count in self.work.items() if work.name in PRODUCTS)


OWN_PRODUCT = kernels.PRODUCTS[0]
"""That of `kernels`, with frozen weights; what is added to it counts by its bytes alone.

So does bringing a weight out of few bits: a few hundredths of its time at most.
"""
PRODUCTS: Mapping[str, Callable[..., tuple[int, ...]]] = {
    "mm": lambda a, b, *_: (1, a.shape[0], a.shape[1], b.shape[1]),
    "addmm": lambda c, a, b, *_: (1, a.shape[0], a.shape[1], b.shape[1]),
    "addmm_": lambda c, a, b, *_: (1, a.shape[0], a.shape[1], b.shape[1]),
    "bmm": lambda a, b, *_: (a.shape[0], a.shape[1], a.shape[2], b.shape[2]),
    "baddbmm": lambda c, a, b, *_: (a.shape[0], a.shape[1], a.shape[2], b.shape[2]),
    "mv": lambda a, b, *_: (1, a.shape[0], a.shape[1], 1),
    OWN_PRODUCT: lambda a, y, *_: (1, *a.shape, y.shape[1]),
}
"""The operations that multiply matrices, with their sizes: of two factors, of our own of the first and the result."""
_ATTENTION = {"deltatune::attention": 2, "deltatune::attention_backward": 5}
"""How many products of each head's queries and keys an operation makes: they count as one, so many times as deep."""


def work_of(operation: Any, inputs: Sequence[Any], out: Any) -> Work | None:
    """What an operation was; None for one that moves nothing.

    One that is not PyTorch's own is known by its bytes alone, those of the tensors that it is given and those that it
    gives or writes over; attention by its products, too.
    """
    name: str = operation._overloadpacket.__name__
    foreign = operation.namespace != "aten"
    if foreign:
        name = operation._overloadpacket._qualified_op_name
    elif name in _VIEWS:
        return None
    if name == "deltatune::decode_":
        return _decoding(inputs)
    read, outputs = _tensors(inputs), _tensors(out if isinstance(out, (tuple, list)) else [out])
    if foreign:
        outputs = [one for one in outputs if not any(one is other for other in read)]
        outputs += _tensors(
            [value for value, one in zip(inputs, operation._schema.arguments, strict=False) if _writes(one)]
        )
    if not outputs and not name.endswith("_"):
        return None
    size = sum(one.nbytes for one in (*read, *outputs))
    if name in kernels.PRODUCTS:
        return Work(OWN_PRODUCT, outputs[0].dtype, PRODUCTS[OWN_PRODUCT](read[0], outputs[0]), size)
    if name in PRODUCTS:
        return Work(name, outputs[0].dtype, PRODUCTS[name](*read), size)
    if name in _ATTENTION:
        query, key = read[:2]
        (texts, heads, queries, width), tokens = query.shape, key.shape[2]
        return Work("bmm", query.dtype, (texts * heads, queries, _ATTENTION[name] * width, tokens), size)
    largest = max((*outputs, *read), key=lambda one: one.nbytes, default=torch.empty(0))
    written = max((one.numel() for one in (*outputs, *read)), default=0)
    return Work(name, largest.dtype, (written,), size)


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among values, then those in lists among them."""
    within = [one for value in values if isinstance(value, (list, tuple)) for one in value]
    return [one for one in (*values, *within) if isinstance(one, Tensor)]


def _decoding(inputs: Sequence[Any]) -> Work:
    codes, *_, words, out, _ = inputs
    numbers = out.numel()
    size = numbers * out.element_size() + codes.nbytes * numbers // max(1, codes.numel())
    return Work(f"decode {words.partition(':')[0]}", out.dtype, (numbers,), size)


_VIEWS = frozenset(
    [
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "permute",
        "detach",
        "alias",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "split",
        "split_with_sizes",
        "unbind",
        "as_strided",
        "chunk",
        "lift_fresh",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "_reshape_alias",
        "diagonal",
        "unfold",
        "view_as_real",
        "view_as_complex",
        "_local_scalar_dense",
        "equal",
    ]
)
"""Operations that move nothing."""
