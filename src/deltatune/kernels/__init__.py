"""What a training step does between its matrix products, in one pass each: operators over the loops of kernels.c.

They are for CPUs, and there where the machine has a C compiler. Everybody who uses one asks `ready` first and has
another way. They are operators of PyTorch's, so what watches those (a profiler, a plan) sees them too.
"""

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from deltatune.kernels.build import library

_RANKS = 8
"""Ranks that kernels.c computes together."""
_LANES, _QUERIES = 16, 32
"""Numbers of its registers, and queries that it computes together."""
_BITS = {torch.bfloat16: 16, torch.float32: 32}


def ready(*tensors: Tensor) -> bool:
    """Whether the operators take these tensors: all bf16, or all fp32, and on a CPU or without numbers."""
    kind = tensors[0].dtype
    here = all(tensor.device.type in ("cpu", "meta") and tensor.dtype == kind for tensor in tensors)
    return here and kind in _BITS and not isinstance(library(_BITS[kind]), str)


def attends(*tensors: Tensor) -> bool:
    """Whether `attention` takes these and is worth it: with narrower registers its tiles do not fit into them."""
    return ready(*tensors) and wide()


def wide() -> bool:
    """Whether the loops are here, and made for a processor with wide registers."""
    made = library(16)
    return not isinstance(made, str) and bool(ctypes.c_int32.in_dll(made, "wide_registers").value)


def missing() -> str:
    """Why there are none here; empty where there are."""
    found = library(16)
    return found if isinstance(found, str) else ""


def rms_norm(
    x: Float[Tensor, "rows width"], weight: Float[Tensor, " width"], epsilon: float
) -> tuple[Float[Tensor, "rows width"], Float[Tensor, " rows"]]:
    """w · (x·r), and r = 1 / √(mean(x²) + ε) in fp32; x·r is rounded to the type of x before w."""
    found: tuple[Tensor, Tensor] = torch.ops.deltatune.rms_norm(x.contiguous(), weight, epsilon)
    return found


def rms_norm_backward(
    x: Float[Tensor, "rows width"],
    weight: Float[Tensor, " width"],
    scales: Float[Tensor, " rows"],
    dy: Float[Tensor, "rows width"],
) -> Float[Tensor, "rows width"]:
    """With g = w·dy:   dx = r·(g − x·r²·mean(x·g))."""
    dx: Tensor = torch.ops.deltatune.rms_norm_backward(x.contiguous(), weight, scales, dy.contiguous())
    return dx


def gated_silu(gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """gate · σ(gate) · up; the first product is rounded before the second."""
    y: Tensor = torch.ops.deltatune.gated_silu(gate.contiguous(), up.contiguous())
    return y


def gated_silu_backward(
    gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"], dy: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """With s = σ(gate):   dgate = dy · up · s · (1 + gate·(1 − s)),  dup = dy · gate · s."""
    found: tuple[Tensor, Tensor] = torch.ops.deltatune.gated_silu_backward(
        gate.contiguous(), up.contiguous(), dy.contiguous()
    )
    return found


def rotate(
    x: Float[Tensor, "tokens heads size"],
    cosines: Float[Tensor, "tokens size"],
    sines: Float[Tensor, "tokens size"],
    back: bool,
) -> Float[Tensor, "tokens heads size"]:
    """x · cos + [−x₂, x₁] · sin, with x₁ and x₂ the two halves of each head; `back` is its transpose."""
    y: Tensor = torch.ops.deltatune.rotate(x.contiguous(), cosines.contiguous(), sines.contiguous(), back)
    return y


def attention(
    query: Float[Tensor, "texts heads queries size"],
    key: Float[Tensor, "texts groups tokens size"],
    value: Float[Tensor, "texts groups tokens size"],
    bias: Float[Tensor, "#texts #groups #each #queries tokens"] | None,
    bounds: Int[Tensor, " bounds"] | None,
    sees: "Sees",
    scaling: float,
    dropout: float,
    seed: int,
) -> tuple[Float[Tensor, "texts queries heads size"], Float[Tensor, "texts queries heads 2"]]:
    """softmax(Q Kᵀ · scaling + bias) V, its weights dropped, and what `attention_backward` needs.

    With `bounds` texts stand one after another in a single row, from each of these places to the next, and see
    themselves alone. Tensors can have any strides, but the last; what they hold is not copied.
    """
    found: tuple[Tensor, Tensor] = torch.ops.deltatune.attention(
        *map(_last_dense, (query, key, value)), bias, bounds, *sees, scaling, dropout, seed
    )
    return found


def attention_backward(
    query: Float[Tensor, "texts heads queries size"],
    key: Float[Tensor, "texts groups tokens size"],
    value: Float[Tensor, "texts groups tokens size"],
    bias: Float[Tensor, "#texts #groups #each #queries tokens"] | None,
    bounds: Int[Tensor, " bounds"] | None,
    sees: "Sees",
    scaling: float,
    dropout: float,
    seed: int,
    dy: Float[Tensor, "texts queries heads size"],
    tops: Float[Tensor, "texts queries heads 2"],
) -> tuple[
    Float[Tensor, "texts queries heads size"],
    Float[Tensor, "texts tokens groups size"],
    Float[Tensor, "texts tokens groups size"],
]:
    """The gradients of queries, keys and values: their weights are computed anew."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.deltatune.attention_backward(
        *map(_last_dense, (query, key, value)), bias, bounds, *sees, scaling, dropout, seed, dy.contiguous(), tops
    )
    return found


class Sees(NamedTuple):
    """Which tokens of a text a token sees, bias apart."""

    causal: bool = False
    """No later ones."""
    window: int = 0
    """Where that is not 0, so many at most, itself among them."""


def low_rank(
    x: Float[Tensor, "tokens in"],
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    bias: Float[Tensor, " out"] | None,
    scale: float,
) -> tuple[Float[Tensor, "tokens out"], Float[Tensor, "tokens padded"], Float[Tensor, "rank out"]]:
    """(x·Aᵀ)·(scale·B)ᵀ + bias, and what `low_rank_backward` needs: h = x·Aᵀ and (scale·B)ᵀ.

    A and B are fp32, and so is h, which has 8, 16, … columns, of which the first `rank` count.
    """
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.deltatune.low_rank(
        x.contiguous(), A.contiguous(), B.contiguous(), bias, scale
    )
    return found


def low_rank_backward(
    x: Float[Tensor, "tokens in"],
    h: Float[Tensor, "tokens padded"],
    dy: Float[Tensor, "tokens out"],
    A: Float[Tensor, "rank in"],
    scaled: Float[Tensor, "rank out"],
    scale: float,
) -> tuple[Float[Tensor, "tokens in"], Float[Tensor, "rank in"], Float[Tensor, "rank out"]]:
    """dx = dh·A,  dA = dhᵀ·x  and  dBᵀ = scale·hᵀ·dy,  with dh = dy·(scale·B)."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.deltatune.low_rank_backward(
        x.contiguous(), h, dy.contiguous(), A.contiguous(), scaled, scale
    )
    return found


def scale_columns(
    x: Float[Tensor, "rows width"], factors: Float[Tensor, " width"], bias: Float[Tensor, " width"] | None
) -> Float[Tensor, "rows width"]:
    """factors ⊙ x + bias; both are fp32."""
    y: Tensor = torch.ops.deltatune.scale_columns(x.contiguous(), factors.contiguous(), bias)
    return y


def scale_columns_backward(
    x: Float[Tensor, "rows width"], factors: Float[Tensor, " width"], dy: Float[Tensor, "rows width"]
) -> tuple[Float[Tensor, "rows width"], Float[Tensor, " width"]]:
    """dx = factors ⊙ dy, and Σ dy ⊙ x over the rows in fp32."""
    found: tuple[Tensor, Tensor] = torch.ops.deltatune.scale_columns_backward(
        x.contiguous(), factors.contiguous(), dy.contiguous()
    )
    return found


def decode(
    codes: Tensor,
    scales: Tensor,
    coarse: Tensor | None,
    offset: Tensor | None,
    tables: tuple[Tensor, Tensor | None],
    out: Float[Tensor, " numbers"],
    start: int,
    block: int,
    bits: int,
) -> None:
    """level · scale in fp32 for each code of a quantised weight from place `start` on, rounded once into `out`.

    The tensors are those of `weights.codec.Packed`; `tables` the levels of 8-bit scales, and of codes of fewer bits.
    """
    if not out.is_meta:
        given = codes, scales, coarse, offset, *tables, out
        _run("decode", out, *given, start, out.numel(), block, bits)


def cross_entropy_(
    logits: Float[Tensor, "rows classes"], targets: Int[Tensor, " rows"], units: int
) -> Float[Tensor, " rows"]:
    """log Σ exp z − z_target of each row z; (softmax(z) − one-hot) / units overwrites the logits, which are dense."""
    losses: Tensor = torch.ops.deltatune.cross_entropy_(logits, targets, units)
    return losses


def drop(x: Float[Tensor, "*shape"], p: float, seed: int) -> Float[Tensor, "*shape"]:
    """The elements of x, each zeroed with probability p (to within 2⁻¹⁶) or divided by 1 − p; a seed drops the same."""
    y: Tensor = torch.ops.deltatune.drop(x.contiguous(), p, seed)
    return y


def _run(name: str, like: Tensor, *arguments: Tensor | float | int | ctypes.Array[Any] | None) -> None:
    """Calls a function of the library for the type of `like`: tensors by where they are, the rest as they are."""
    made = library(_BITS[like.dtype])
    assert not isinstance(made, str), made
    made[name](*map(_argument, arguments))


def _argument(value: Tensor | float | int | ctypes.Array[Any] | None) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_int64(value) if isinstance(value, int) else value


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    y, scales = torch.empty_like(x), torch.empty(len(x), dtype=torch.float32, device=x.device)
    if not x.is_meta:
        _run("rms_norm", x, x, weight, epsilon, y, scales, *x.shape)
    return y, scales


def _rms_norm_backward(x: Tensor, weight: Tensor, scales: Tensor, dy: Tensor) -> Tensor:
    dx = torch.empty_like(x)
    if not x.is_meta:
        _run("rms_norm_backward", x, x, weight, scales, dy, dx, *x.shape)
    return dx


def _gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate)
    if not gate.is_meta:
        _run("gated_silu", gate, gate, up, y, gate.numel())
    return y


def _gated_silu_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    if not gate.is_meta:
        _run("gated_silu_backward", gate, gate, up, dy, dgate, dup, gate.numel())
    return dgate, dup


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor, back: bool) -> Tensor:
    y = torch.empty_like(x)
    if not x.is_meta:
        tokens, heads, size = x.shape
        _run("rotate", x, x, cosines, sines, y, -1.0 if back else 1.0, tokens, heads, size // 2)
    return y


def _attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, bounds: Tensor | None, *how: Any
) -> tuple[Tensor, Tensor]:
    texts, heads, queries, size = query.shape
    y = query.new_empty(texts, queries, heads, size)
    tops = query.new_empty(texts, queries, heads, 2, dtype=torch.float32)
    if not query.is_meta:
        job = _Job(query, key, value, bias, bounds, *how)
        _run("attention", query, *job.inputs, y, tops, *job.memory())
    return y, tops


def _attention_backward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, bounds: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *how, dy, tops = rest
    texts, groups, tokens, size = key.shape
    dq, dk, dv = torch.empty_like(dy), *(key.new_empty(texts, tokens, groups, size) for _ in range(2))
    if not query.is_meta:
        job = _Job(query, key, value, bias, bounds, *how)
        _run("attention_backward", query, *job.inputs, dy, tops, dq, dk, dv, *job.memory())
    return dq, dk, dv


class _Job:
    """What both directions of attention are told."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, bounds: Tensor | None,
        causal: bool, window: int, scaling: float, dropout: float, seed: int,
    ) -> None:  # fmt: skip
        (texts, heads, queries, size), groups, tokens = query.shape, key.shape[1], key.shape[2]
        if bounds is not None:
            bounds = bounds.to(torch.int32)
            shortest, longest = bounds.diff().aminmax()
            if shortest < 0 or bounds[0] != 0 or bounds[-1] != queries or queries != tokens:
                raise ValueError(f"{bounds.tolist()} are no bounds of texts that fill a row of {queries} tokens")
            texts, tokens = len(bounds) - 1, int(longest)
        self._places = size, tokens
        strides = [stride for x in (query, key, value) for stride in x.stride()[:3]]
        if bias is not None:
            bias = bias.expand(*bias.shape[:-1], tokens).contiguous()
            strides += bias.expand(texts, groups, heads // groups, queries, tokens).stride()[:4]
        else:
            strides += [0] * 4
        numbers = texts, heads, groups, queries, tokens, size, causal, window, *strides, seed, round(dropout * 2**16)
        job = (ctypes.c_int64 * len(numbers))(*numbers)
        self.inputs = query, key, value, bias, bounds, job, scaling, 1 / (1 - dropout) if dropout else 0.0

    def memory(self) -> tuple[Tensor, int, int]:
        """Room for every thread, how many bytes each has, and how many threads there are."""
        size, tokens = (-(-one // _LANES) * _LANES for one in self._places)
        each, threads = 20 * (size * tokens + _QUERIES * (size + tokens)), torch.get_num_threads()
        return torch.empty(threads, each, dtype=torch.uint8), each, threads


def _last_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _low_rank(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    (tokens, width), (out, rank) = x.shape, B.shape
    y, scaled = x.new_empty(tokens, out), A.new_empty(rank, out)
    h = A.new_empty(tokens, -(-rank // _RANKS) * _RANKS)
    if not x.is_meta:
        _run("low_rank", x, x, A, B, bias, scale, y, h, scaled, tokens, width, out, rank)
    return y, h, scaled


def _low_rank_backward(
    x: Tensor, h: Tensor, dy: Tensor, A: Tensor, scaled: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    (tokens, width), (rank, out) = x.shape, scaled.shape
    dx, dA, dB = torch.empty_like(x), torch.empty_like(A), torch.empty_like(scaled)
    threads = torch.get_num_threads()
    sums = A.new_empty(threads, rank * (width + out))
    if not x.is_meta:
        sizes = tokens, width, out, rank, threads
        _run("low_rank_backward", x, x, h, dy, A, scaled, scale, dx, sums, dA, dB, *sizes)
    return dx, dA, dB


def _scale_columns(x: Tensor, factors: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.empty_like(x)
    if not x.is_meta:
        _run("scale_columns", x, x, factors, bias, y, *x.shape)
    return y


def _scale_columns_backward(x: Tensor, factors: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    dx, products, threads = torch.empty_like(dy), torch.empty_like(factors), torch.get_num_threads()
    sums = factors.new_empty(threads, len(factors))
    if not x.is_meta:
        _run("scale_columns_backward", x, x, factors, dy, dx, sums, products, *x.shape, threads)
    return dx, products


def _cross_entropy(logits: Tensor, targets: Tensor, units: int) -> Tensor:
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if not logits.is_meta:
        _run("cross_entropy", logits, logits, targets, 1 / units, losses, *logits.shape)
    return losses


def _drop(x: Tensor, p: float, seed: int) -> Tensor:
    y = torch.empty_like(x)
    if not x.is_meta:
        _run("drop", x, x, y, seed, round(p * 2**16), 1 / (1 - p), x.numel())
    return y


_operators = torch.library.Library("deltatune", "FRAGMENT")  # type: ignore[no-untyped-call]


def _define(signature: str, function: Callable[..., Any]) -> None:
    _operators.define(signature)  # type: ignore[no-untyped-call]
    _operators.impl(signature.partition("(")[0], function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


_define("rms_norm(Tensor x, Tensor weight, float epsilon) -> (Tensor, Tensor)", _rms_norm)
_define("rms_norm_backward(Tensor x, Tensor weight, Tensor scales, Tensor dy) -> Tensor", _rms_norm_backward)
_define("gated_silu(Tensor gate, Tensor up) -> Tensor", _gated_silu)
_define("gated_silu_backward(Tensor gate, Tensor up, Tensor dy) -> (Tensor, Tensor)", _gated_silu_backward)
_define("rotate(Tensor x, Tensor cosines, Tensor sines, bool back) -> Tensor", _rotate)
_define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? bounds, bool causal, int window,"
    " float scaling, float dropout, int seed) -> (Tensor, Tensor)",
    _attention,
)
_define(
    "attention_backward(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? bounds, bool causal, int window,"
    " float scaling, float dropout, int seed, Tensor dy, Tensor tops) -> (Tensor, Tensor, Tensor)",
    _attention_backward,
)
_define("low_rank(Tensor x, Tensor A, Tensor B, Tensor? bias, float scale) -> (Tensor, Tensor, Tensor)", _low_rank)
_define(
    "low_rank_backward(Tensor x, Tensor h, Tensor dy, Tensor A, Tensor scaled, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    _low_rank_backward,
)
_define("scale_columns(Tensor x, Tensor factors, Tensor? bias) -> Tensor", _scale_columns)
_define("scale_columns_backward(Tensor x, Tensor factors, Tensor dy) -> (Tensor, Tensor)", _scale_columns_backward)
_define("cross_entropy_(Tensor(a!) logits, Tensor targets, int units) -> Tensor", _cross_entropy)
_define("drop(Tensor x, float p, int seed) -> Tensor", _drop)
