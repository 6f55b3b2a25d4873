"""Products with frozen weights."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from deltatune.kernels.loops import Loop, multiplies_pairs, operator, ready
from deltatune.kernels.passes import Codes

HIGHEST_RANK = 16
"""Of an update that `product` takes; products of a higher one are worth being products of their own."""
PRODUCTS = ("deltatune::product", "deltatune::coded_product", "deltatune::magnified_product")
"""The names of its operators: for numbers, for codes, and with norms found on the way, as if there were more tokens."""
_PAIRS = 32
"""Numbers of a register of bf16."""
_DEEP, _PANEL, _MOST, _TALL = 2**12, 64, 512, 96
"""Numbers of a row that products.c multiplies before it carries sums on, fewest and most columns of these, and so
many rows that they are whole tiles, of 6 or of 32."""


def multiplies(x: Float[Tensor, "tokens in"], weight: Float[Tensor, "out in"]) -> bool:
    """Whether `product` takes these and is faster than PyTorch's own."""
    if x.dtype != torch.bfloat16 or not (ready(x, weight) and multiplies_pairs()):
        return False
    out, width = weight.shape
    return weight.stride() in ((width, 1), (1, out)) and _whole(out, width)


def multiplies_codes(x: Float[Tensor, "tokens inner"], out: int, width: int) -> bool:
    """Whether `product` takes codes of a weight (out, width); it is faster than to decode that first."""
    return x.dtype == torch.bfloat16 and ready(x) and multiplies_pairs() and _whole(out, width)


class Coded(NamedTuple):
    """A weight (outer, inner) that codes stand for, or where it is `turned` its transpose."""

    codes: Codes
    outer: int
    turned: bool = False


Factor = Tensor | Coded
"""What `product` multiplies with: (outer, inner), in one layout or the other."""


def product(
    x: Float[Tensor, "tokens inner"],
    weight: Factor,
    bias: Float[Tensor, " outer"] | None = None,
    update: tuple[Float[Tensor, "tokens padded"], Float[Tensor, "rank outer"]] | None = None,
    scales: Float[Tensor, " inner"] | None = None,
) -> Float[Tensor, "tokens outer"]:
    """x·Wᵀ + h·F + bias in bf16, where h and F, the `update`, are fp32; summed in fp32 and rounded once.

    A row of the result has the same bits whatever stands in the others, and on as many threads as there are. h has the
    columns that `low_rank` gives it. With `scales`, in fp32, it is (x ⊙ scales)·Wᵀ, where W is multiplied by them and
    rounded, not x. What codes stand for is never in memory as a whole, and gives the bits that it would give there.
    """
    h, factor = (None, None) if update is None else (update[0], update[1].contiguous())
    more = scales, bias, h, factor
    if isinstance(weight, Tensor):
        y: Tensor = _PRODUCT(x.contiguous(), weight, *more)
    else:
        y = _CODED_PRODUCT(x.contiguous(), *_stored(weight), *more)
    return y


class Magnified(NamedTuple):
    """What `magnified_product` gives, and what goes back through it."""

    y: Float[Tensor, "tokens out"]
    scales: Float[Tensor, " out"]
    """m/n."""
    factor: Float[Tensor, "rank out"]
    """m/n ⊙ F."""


def magnified_product(
    x: Float[Tensor, "tokens in"],
    weight: Factor,
    update: tuple[Float[Tensor, "tokens padded"], Float[Tensor, "rank out"]],
    A: Float[Tensor, "rank in"],
    m: Float[Tensor, " out"],
    squares: Float[Tensor, " out"],
) -> Magnified | None:
    """m/n ⊙ (x·Wᵀ + h·F), where n is the norm of each row of W + Fᵀ·A; 1 stands for one that is zero.

    As `product`; all but x and W is fp32. A panel of W is in a cache when its norms are computed, with A in bf16;
    `squares` are those of W's own rows. None where something in m/n is zero: what it multiplied could not be told from
    y, and m has a gradient from that.
    """
    h, factor = update
    y, scales, scaled, whole = _MAGNIFIED_PRODUCT(
        x.contiguous(), *_stored(weight), h, factor.contiguous(), A.contiguous(), m.contiguous(), squares
    )
    return Magnified(y, scales, scaled) if x.is_meta or whole.item() else None


def _whole(out: int, width: int) -> bool:
    return out % _PAIRS == width % _PAIRS == 0


_Stored = tuple[Tensor, list[Tensor | None], int, int, bool]
"""A factor for the operators: what is stored, in two dimensions, then how codes are read."""


def _stored(weight: Factor) -> _Stored:
    if isinstance(weight, Tensor):
        return weight, [], 0, 0, False
    (codes, *others, block, bits), outer, turned = weight
    rows = codes.numel() * 8 // bits // outer if turned else outer
    return codes.view(rows, -1), others, block, bits, turned


def _product(
    x: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor | None, h: Tensor | None, factor: Tensor | None
) -> Tensor:
    y = x.new_empty(len(x), len(weight))
    if not x.is_meta:
        _product_loop(x, x, weight, int(weight.stride(0) == 1), scales, *_beside(x, y, bias, h, factor))
    return y


def _coded_product(
    x: Tensor,
    weight: Tensor,
    coding: list[Tensor | None],
    block: int,
    bits: int,
    turned: bool,
    scales: Tensor | None,
    bias: Tensor | None,
    h: Tensor | None,
    factor: Tensor | None,
) -> Tensor:
    y = x.new_empty(len(x), weight.shape[1] * 8 // bits if turned else len(weight))
    if not x.is_meta:
        read = None, weight, *coding, block, bits, int(turned)
        _any_product_loop(x, x, *read, scales, *(None,) * 6, *_beside(x, y, bias, h, factor))
    return y


def _magnified_product(
    x: Tensor,
    weight: Tensor,
    coding: list[Tensor | None],
    block: int,
    bits: int,
    turned: bool,
    h: Tensor,
    factor: Tensor,
    A: Tensor,
    m: Tensor,
    squares: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = x.new_empty(len(x), len(weight))
    scales, scaled, whole = torch.empty_like(m), torch.empty_like(factor), m.new_empty(1)
    if not x.is_meta:
        read = (None, weight, *coding) if coding else (weight, *(None,) * 6)
        turned = not coding and weight.stride(0) == 1
        magnitude = A, m, squares, scales, scaled, whole
        _any_product_loop(x, x, *read, block, bits, int(turned), None, *magnitude, *_beside(x, y, None, h, factor))
    return y, scales, scaled, whole


def _beside(
    x: Tensor, y: Tensor, bias: Tensor | None, h: Tensor | None, factor: Tensor | None
) -> tuple[Tensor | int | None, ...]:
    """What a product's loop is given besides its two factors."""
    (tokens, width), out, threads = x.shape, y.shape[1], torch.get_num_threads()
    rank, padded = (0, 0) if h is None or factor is None else (len(factor), h.shape[1])
    if rank > HIGHEST_RANK:
        raise ValueError(f"a product takes an update of rank {HIGHEST_RANK} at most, not of {rank}")
    columns = min(max(_PANEL, -(-out // threads)), _MOST)
    each = -(-tokens // _TALL) * _TALL * columns if width > _DEEP else 0
    room = x.new_empty(threads, each, dtype=torch.float32) if each else None
    return bias, h, factor, rank, padded, y, room, each, tokens, width, out, threads


_product_loop = Loop("product", "ttnttttnnttnnnnn")
_any_product_loop = Loop("any_product", "ttttttttnnnttttttttttnnttnnnnn")
_CODING = "Tensor?[] coding, int block, int bits, bool turned"
_MORE = "Tensor? scales, Tensor? bias, Tensor? h, Tensor? factor"
_PRODUCT = operator(f"product(Tensor x, Tensor weight, {_MORE}) -> Tensor", _product)
_CODED_PRODUCT = operator(f"coded_product(Tensor x, Tensor weight, {_CODING}, {_MORE}) -> Tensor", _coded_product)
_MAGNIFIED_PRODUCT = operator(
    f"magnified_product(Tensor x, Tensor weight, {_CODING}, Tensor h, Tensor factor, Tensor A, Tensor m,"
    " Tensor squares) -> (Tensor, Tensor, Tensor, Tensor)",
    _magnified_product,
)
