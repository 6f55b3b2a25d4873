"""Attention in one loop each way; its weights are never written to memory."""

import ctypes
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from deltatune.kernels.loops import Loop, operator, ready, wide

_LANES, _QUERIES = 16, 32
"""Numbers of a register, and queries that attention.c computes together."""


class Sees(NamedTuple):
    """Which tokens of a text a token sees, bias apart."""

    causal: bool = False
    """No later ones."""
    window: int = 0
    """Where that is not 0, so many at most, itself among them."""
    shared: int = 0
    """Tokens with which a row begins that are the beginning of each of its texts, though they stand in it once."""


def attends(*tensors: Tensor) -> bool:
    """Whether `attention` takes these and is worth it: with narrower registers its tiles do not fit into them."""
    return ready(*tensors) and wide()


def attention(
    query: Float[Tensor, "texts heads queries size"],
    key: Float[Tensor, "texts groups tokens size"],
    value: Float[Tensor, "texts groups tokens size"],
    bias: Float[Tensor, "#texts #groups #each #queries #tokens"] | None,
    bounds: Int[Tensor, " bounds"] | None,
    sees: Sees,
    scaling: float,
    dropout: float,
    seed: int,
) -> tuple[Float[Tensor, "texts queries heads size"], Float[Tensor, "heads 2 rows"]]:
    """softmax(Q Kᵀ · scaling + bias) V, its weights dropped, and what `attention_backward` needs.

    With `bounds` texts stand one after another in a single row, from each of these places to the next, and see
    themselves alone, and what all share. Tensors can have any strides, but the last; what they hold is not copied, but
    for keys and values of texts whose beginning stands elsewhere.
    """
    found: tuple[Tensor, Tensor] = _ATTENTION(
        *map(_last_dense, (query, key, value)), bias, bounds, *sees, scaling, dropout, seed
    )
    return found


def attention_backward(
    query: Float[Tensor, "texts heads queries size"],
    key: Float[Tensor, "texts groups tokens size"],
    value: Float[Tensor, "texts groups tokens size"],
    bias: Float[Tensor, "#texts #groups #each #queries #tokens"] | None,
    bounds: Int[Tensor, " bounds"] | None,
    sees: Sees,
    scaling: float,
    dropout: float,
    seed: int,
    dy: Float[Tensor, "texts queries heads size"],
    tops: Float[Tensor, "heads 2 rows"],
) -> tuple[
    Float[Tensor, "texts queries heads size"],
    Float[Tensor, "texts tokens groups size"],
    Float[Tensor, "texts tokens groups size"],
]:
    """The gradients of queries, keys and values: their weights are computed anew."""
    found: tuple[Tensor, Tensor, Tensor] = _ATTENTION_BACKWARD(
        *map(_last_dense, (query, key, value)), bias, bounds, *sees, scaling, dropout, seed, dy.contiguous(), tops
    )
    return found


def _attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, bounds: Tensor | None, *how: Any
) -> tuple[Tensor, Tensor]:
    texts, heads, queries, size = query.shape
    y = query.new_empty(texts, queries, heads, size)
    tops = query.new_empty(heads, 2, texts * queries, dtype=torch.float32)
    if not query.is_meta:
        job = _Job(query, key, value, bias, bounds, *how)
        _attention_loop(query, *job.inputs, y, tops, *job.memory())
    return y, tops


def _attention_backward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, bounds: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *how, dy, tops = rest
    texts, groups, tokens, size = key.shape
    dq, dk, dv = torch.empty_like(dy), *(key.new_empty(texts, tokens, groups, size) for _ in range(2))
    if not query.is_meta:
        job = _Job(query, key, value, bias, bounds, *how)
        _attention_backward_loop(query, *job.inputs, dy, tops, dq, dk, dv, job.parts(), *job.memory())
    return dq, dk, dv


class _Job:
    """What both directions of attention are told."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, bounds: Tensor | None,
        causal: bool, window: int, shared: int, scaling: float, dropout: float, seed: int,
    ) -> None:  # fmt: skip
        (texts, heads, queries, size), groups, tokens = query.shape, key.shape[1], key.shape[2]
        rows = texts * queries
        if bounds is not None:
            places = bounds.tolist()
            lengths = [until - begin for begin, until in pairwise(places)]
            if min(lengths) < 0 or places[0] != 0 or places[-1] != queries or queries != tokens:
                raise ValueError(f"{places} are no bounds of texts that fill a row of {queries} tokens")
            if not 0 <= shared <= lengths[0]:
                raise ValueError(f"a first text of {lengths[0]} tokens does not begin with the {shared} that all share")
            bounds = bounds.to(torch.int32)
            texts, tokens = len(lengths), max(lengths[0], shared + max(lengths[1:], default=0))
        elif shared:
            raise ValueError("texts share tokens in a single row alone")
        self._sizes = texts, groups, size, tokens, shared
        strides = [stride for x in (query, key, value) for stride in x.stride()[:3]]
        if bias is not None:
            bias = bias.expand(*bias.shape[:-1], tokens).contiguous()
            strides += bias.expand(texts, groups, heads // groups, queries, tokens).stride()[:4]
        else:
            strides += [0] * 4
        numbers = (
            texts,
            heads,
            groups,
            queries,
            tokens,
            size,
            rows,
            causal,
            window,
            shared,
            *strides,
            seed,
            round(dropout * 2**16),
        )
        job = (ctypes.c_int64 * len(numbers))(*numbers)
        self.inputs = query, key, value, bias, bounds, job, scaling, 1 / (1 - dropout) if dropout else 0.0

    def memory(self) -> tuple[Tensor, int, int]:
        """Room for every thread, how many bytes each has, and how many threads there are."""
        _, _, size, tokens, _ = self._sizes
        size, tokens = _filled(size), _filled(tokens)
        each, threads = 28 * size * tokens + 24 * _QUERIES * (size + tokens), torch.get_num_threads()
        return torch.empty(threads, each, dtype=torch.uint8), each, threads

    def parts(self) -> Float[Tensor, "texts groups 2 shared filled"]:
        """Room for what each text says of the keys and values that all share."""
        texts, groups, size, _, shared = self._sizes
        return torch.empty(texts, groups, 2, shared, _filled(size), dtype=torch.float32)


def _filled(count: int) -> int:
    return -(-count // _LANES) * _LANES


def _last_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


_attention_loop = Loop("attention", "ttttttfftttnn")
_attention_backward_loop = Loop("attention_backward", "ttttttfftttttttnn")
_ATTENTION = operator(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? bounds, bool causal, int window,"
    " int shared, float scaling, float dropout, int seed) -> (Tensor, Tensor)",
    _attention,
)
_ATTENTION_BACKWARD = operator(
    "attention_backward(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? bounds, bool causal, int window,"
    " int shared, float scaling, float dropout, int seed, Tensor dy, Tensor tops) -> (Tensor, Tensor, Tensor)",
    _attention_backward,
)
