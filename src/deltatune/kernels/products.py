"""Products with frozen weights, and low-rank updates and magnitudes beside them."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from deltatune.kernels.loops import Loop, multiplies_pairs, operator, ready
from deltatune.kernels.passes import Codes

_LANES, _RANKS, _MANY = 16, 8, 64
"""Numbers of fp32 in a register, and ranks and at most so many tokens that low_rank.c computes together."""
_HIGH = 16
"""Ranks of an update that products.c has room for."""
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


def low_rank(
    x: Float[Tensor, "tokens in"], A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], scale: float
) -> tuple[Float[Tensor, "tokens padded"], Float[Tensor, "rank out"]]:
    """h = x·Aᵀ and F = (scale·B)ᵀ: what is added to a product is h·F.

    All but x is fp32. h has 8, 16, … columns, of which the first `rank` count.
    """
    found: tuple[Tensor, Tensor] = _LOW_RANK(x.contiguous(), A.contiguous(), B.contiguous(), scale)
    return found


def low_rank_output(
    h: Float[Tensor, "tokens padded"],
    factor: Float[Tensor, "rank out"],
    bias: Float[Tensor, " out"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "tokens out"]:
    """h·F + bias, which is of the type of the result."""
    y: Tensor = _LOW_RANK_OUTPUT(h, factor.contiguous(), bias, dtype)
    return y


def low_rank_backward(
    x: Float[Tensor, "tokens in"],
    h: Float[Tensor, "tokens padded"],
    dy: Float[Tensor, "tokens out"],
    factor: Float[Tensor, "rank out"],
    scale: float,
) -> tuple[Float[Tensor, "tokens padded"], Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """dh = dy·Fᵀ,  dA = dhᵀ·x  and  dB = scale·dyᵀ·h;  dh·A is what goes back to x."""
    found: tuple[Tensor, Tensor, Tensor] = _LOW_RANK_BACKWARD(x.contiguous(), h, dy.contiguous(), factor, scale)
    return found


def magnified_low_rank_backward(
    x: Float[Tensor, "tokens in"],
    h: Float[Tensor, "tokens padded"],
    Z: Float[Tensor, "tokens out"],
    m: Float[Tensor, " out"],
    n: Float[Tensor, " out"],
    dy: Float[Tensor, "tokens out"],
    factor: Float[Tensor, "rank out"],
    scale: float,
) -> tuple[
    Float[Tensor, "tokens padded"],
    Float[Tensor, "rank in"],
    Float[Tensor, "out rank"],
    Float[Tensor, "tokens out"],
    Float[Tensor, " out"],
]:
    """`scale_columns_backward`, and `low_rank_backward` from what it gives: dh, dA, dB, dZ and dm."""
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _MAGNIFIED_LOW_RANK_BACKWARD(
        x.contiguous(), h, Z, m.contiguous(), n.contiguous(), dy.contiguous(), factor, scale
    )
    return found


def scaled_low_rank_backward(
    x: Float[Tensor, "tokens in"],
    h: Float[Tensor, "tokens padded"],
    found: Magnified,
    m: Float[Tensor, " out"],
    dy: Float[Tensor, "tokens out"],
    scale: float,
) -> tuple[Float[Tensor, "tokens padded"], Float[Tensor, "rank in"], Float[Tensor, "out rank"], Float[Tensor, " out"]]:
    """`low_rank_backward` from m/n ⊙ dy, and dm = Σ dy ⊙ y / m: dh, dA, dB and dm."""
    back: tuple[Tensor, Tensor, Tensor, Tensor] = _SCALED_LOW_RANK_BACKWARD(
        x.contiguous(), h, *found, m.contiguous(), dy.contiguous(), scale
    )
    return back


class Updated(NamedTuple):
    """W + scale·B·A, and the squares of the norms of the rows of W, (out,). All but W is fp32."""

    weight: Tensor
    A: Tensor
    B: Tensor
    scale: float
    squares: Tensor


def updated_norms(several: Sequence[Updated], none: float = 0.0) -> list[Float[Tensor, " out"]]:
    """The norm of each row of such sums, of all of them in one loop; `none` stands for one that is zero.

    All W are of one type.
    """
    weights, As, Bs, scales, squares = zip(*several, strict=True)
    norms: list[Tensor] = _UPDATED_NORMS(
        [one.contiguous() for one in weights], [one.contiguous() for one in As], [one.contiguous() for one in Bs],
        scales, squares, none,
    )  # fmt: skip
    return norms


def scale_columns(
    x: Float[Tensor, "rows width"],
    m: Float[Tensor, " width"],
    n: Float[Tensor, " width"],
    bias: Float[Tensor, " width"] | None,
) -> Float[Tensor, "rows width"]:
    """m/n ⊙ x + bias; all three are fp32."""
    y: Tensor = _SCALE_COLUMNS(x.contiguous(), m.contiguous(), n.contiguous(), bias)
    return y


def scale_columns_backward(
    x: Float[Tensor, "rows width"],
    m: Float[Tensor, " width"],
    n: Float[Tensor, " width"],
    dy: Float[Tensor, "rows width"],
) -> tuple[Float[Tensor, "rows width"], Float[Tensor, " width"]]:
    """dx = m/n ⊙ dy, and dm = Σ dy ⊙ x / n, summed over the rows in fp32."""
    found: tuple[Tensor, Tensor] = _SCALE_COLUMNS_BACKWARD(
        x.contiguous(), m.contiguous(), n.contiguous(), dy.contiguous()
    )
    return found


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
    if rank > _HIGH:
        raise ValueError(f"a product takes an update of rank {_HIGH} at most, not of {rank}")
    columns = min(max(_PANEL, -(-out // threads)), _MOST)
    each = -(-tokens // _TALL) * _TALL * columns if width > _DEEP else 0
    room = x.new_empty(threads, each, dtype=torch.float32) if each else None
    return bias, h, factor, rank, padded, y, room, each, tokens, width, out, threads


def _low_rank(x: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    (tokens, width), (out, rank) = x.shape, B.shape
    h, factor = A.new_empty(tokens, -(-rank // _RANKS) * _RANKS), A.new_empty(rank, out)
    if not x.is_meta:
        _low_rank_loop(
            x, x, A, B, scale, h, factor, h.new_empty(_in_tiles(rank) // 2 * width), tokens, width, out, rank
        )
    return h, factor


def _in_tiles(rank: int) -> int:
    """Rows of a factor in tiles of matrix units, three for each rank."""
    return -(-3 * -(-rank // _RANKS) * _RANKS // _LANES) * _LANES


def _low_rank_output(h: Tensor, factor: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    tokens, (rank, out) = len(h), factor.shape
    y = h.new_empty(tokens, out, dtype=dtype)
    if not h.is_meta:
        _low_rank_output_loop(y, h, factor, bias, y, tokens, out, rank)
    return y


def _low_rank_backward(x: Tensor, h: Tensor, dy: Tensor, factor: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return _back(x, h, dy, factor, scale, (None,) * 4, (None, None))


def _magnified_low_rank_backward(
    x: Tensor, h: Tensor, Z: Tensor, m: Tensor, n: Tensor, dy: Tensor, factor: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dZ, dm = torch.empty_like(dy), torch.empty_like(m)
    return *_back(x, h, dy, factor, scale, (Z, m, n, None), (dZ, dm)), dZ, dm


def _scaled_low_rank_backward(
    x: Tensor, h: Tensor, y: Tensor, scales: Tensor, factor: Tensor, m: Tensor, dy: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dm = torch.empty_like(m)
    return *_back(x, h, dy, factor, scale, (y, m, None, scales), (None, dm)), dm


def _back(
    x: Tensor,
    h: Tensor,
    dy: Tensor,
    factor: Tensor,
    scale: float,
    magnitude: tuple[Tensor | None, ...],
    slopes: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    (tokens, width), (rank, out), threads = x.shape, factor.shape, torch.get_num_threads()
    dh, dA, dB = torch.empty_like(h), h.new_empty(rank, width), h.new_empty(out, rank)
    tiles, sums_of_rows = _in_tiles(rank), rank * (width + out) + (0 if slopes[1] is None else out)
    each = -(-sums_of_rows // _LANES) * _LANES + tiles * (width + out + _MANY // 2)
    sums = h.new_empty(threads * each + tiles // 2 * out)
    if not x.is_meta:
        sizes = tokens, width, out, rank, threads
        _low_rank_backward_loop(x, x, h, dy, factor, scale, *magnitude, dh, sums, each, dA, dB, *slopes, *sizes)
    return dh, dA, dB


class _Updated(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "A", "B", "squares", "norms")),
        *((name, ctypes.c_int64) for name in ("out", "width", "rank")),
        ("scale", ctypes.c_double),
    )


def _updated_norms(
    weights: list[Tensor], As: list[Tensor], Bs: list[Tensor], scales: list[float], squares: list[Tensor], none: float
) -> list[Tensor]:
    norms = [torch.empty_like(one) for one in squares]
    if not weights[0].is_meta:
        tensors = zip(weights, As, Bs, squares, norms, strict=True)
        several = [
            _Updated(*(one.data_ptr() for one in each), *each[0].shape, len(each[1]), scale)
            for each, scale in zip(tensors, scales, strict=True)
        ]
        _updated_norms_loop(weights[0], (_Updated * len(several))(*several), len(several), none)
    return norms


def _scale_columns(x: Tensor, m: Tensor, n: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.empty_like(x)
    if not x.is_meta:
        _scale_columns_loop(x, x, m, n, bias, y, *x.shape)
    return y


def _scale_columns_backward(x: Tensor, m: Tensor, n: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    dx, dm, threads = torch.empty_like(dy), torch.empty_like(m), torch.get_num_threads()
    sums = m.new_empty(threads, len(m))
    if not x.is_meta:
        _scale_columns_backward_loop(x, x, m, n, dy, dx, sums, dm, *x.shape, threads)
    return dx, dm


_product_loop = Loop("product", "ttnttttnnttnnnnn")
_any_product_loop = Loop("any_product", "ttttttttnnnttttttttttnnttnnnnn")
_low_rank_loop = Loop("low_rank", "tttftttnnnn")
_low_rank_output_loop = Loop("low_rank_output", "ttttnnn")
_low_rank_backward_loop = Loop("low_rank_backward", "ttttfttttttnttttnnnnn")
_updated_norms_loop = Loop("updated_norms", "tnf")
_scale_columns_loop = Loop("scale_columns", "tttttnn")
_scale_columns_backward_loop = Loop("scale_columns_backward", "tttttttnnn")

_CODING = "Tensor?[] coding, int block, int bits, bool turned"
_MORE = "Tensor? scales, Tensor? bias, Tensor? h, Tensor? factor"
_PRODUCT = operator(f"product(Tensor x, Tensor weight, {_MORE}) -> Tensor", _product)
_CODED_PRODUCT = operator(f"coded_product(Tensor x, Tensor weight, {_CODING}, {_MORE}) -> Tensor", _coded_product)
_MAGNIFIED_PRODUCT = operator(
    f"magnified_product(Tensor x, Tensor weight, {_CODING}, Tensor h, Tensor factor, Tensor A, Tensor m,"
    " Tensor squares) -> (Tensor, Tensor, Tensor, Tensor)",
    _magnified_product,
)
_LOW_RANK = operator("low_rank(Tensor x, Tensor A, Tensor B, float scale) -> (Tensor, Tensor)", _low_rank)
_LOW_RANK_OUTPUT = operator(
    "low_rank_output(Tensor h, Tensor factor, Tensor? bias, ScalarType dtype) -> Tensor", _low_rank_output
)
_LOW_RANK_BACKWARD = operator(
    "low_rank_backward(Tensor x, Tensor h, Tensor dy, Tensor factor, float scale) -> (Tensor, Tensor, Tensor)",
    _low_rank_backward,
)
_MAGNIFIED_LOW_RANK_BACKWARD = operator(
    "magnified_low_rank_backward(Tensor x, Tensor h, Tensor Z, Tensor m, Tensor n, Tensor dy, Tensor factor,"
    " float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _magnified_low_rank_backward,
)
_SCALED_LOW_RANK_BACKWARD = operator(
    "scaled_low_rank_backward(Tensor x, Tensor h, Tensor y, Tensor scales, Tensor factor, Tensor m, Tensor dy,"
    " float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    _scaled_low_rank_backward,
)
_UPDATED_NORMS = operator(
    "updated_norms(Tensor[] weights, Tensor[] As, Tensor[] Bs, float[] scales, Tensor[] squares, float none)"
    " -> Tensor[]",
    _updated_norms,
)
_SCALE_COLUMNS = operator("scale_columns(Tensor x, Tensor m, Tensor n, Tensor? bias) -> Tensor", _scale_columns)
_SCALE_COLUMNS_BACKWARD = operator(
    "scale_columns_backward(Tensor x, Tensor m, Tensor n, Tensor dy) -> (Tensor, Tensor)", _scale_columns_backward
)
