"""Low-rank updates beside frozen weights, and magnitudes of columns."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from deltatune.kernels.loops import Loop, operator
from deltatune.kernels.products import Magnified

_LANES, _RANKS, _MANY = 16, 8, 64
"""Numbers of fp32 in a register, and ranks and at most so many tokens that low_rank.c computes together."""


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


_low_rank_loop = Loop("low_rank", "tttftttnnnn")
_low_rank_output_loop = Loop("low_rank_output", "ttttnnn")
_low_rank_backward_loop = Loop("low_rank_backward", "ttttfttttttnttttnnnnn")
_updated_norms_loop = Loop("updated_norms", "tnf")
_scale_columns_loop = Loop("scale_columns", "tttttnn")
_scale_columns_backward_loop = Loop("scale_columns_backward", "tttttttnnn")
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
