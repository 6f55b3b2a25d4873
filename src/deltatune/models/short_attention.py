"""Attention over short texts on a CPU, which keeps little for the backward pass.

Vaswani et al. 2017, arXiv 1706.03762, equation 1. Where the processor's registers are wide it is a compiled loop that
reads queries, keys and values where the layers left them, keeps no weights but computes them anew (Dao et al. 2022,
arXiv 2205.14135, section 3.1), and leaves out what no token sees. Elsewhere, and for a bias that trains, it is plain
batched products, which beat the fused kernel of a CPU up to some hundred tokens. Transformers' own plain attention
repeats the keys and values of grouped queries (Ainslie et al. 2023, arXiv 2305.13245) for each of them, and keeps the
scores in several forms. Here the queries of a group stand side by side over one key, and the weights are kept once, in
the type of the values. Texts that stand one after another in a single row are seen apart: those of one length are
computed together, and nothing between two texts is computed at all.
"""

from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from deltatune import kernels
from deltatune.dropout import Mask, draw, dropped

NAME = "deltatune_short"
_LANES = 32
"""Numbers of bf16 in a register of a CPU."""
_AT_ONCE = 2**16
"""Scores that go through fp32 together: they stay in the cache."""


def attend(
    module: nn.Module,
    query: Float[Tensor, "texts heads queries size"],
    key: Float[Tensor, "texts groups tokens size"],
    value: Float[Tensor, "texts groups tokens size"],
    attention_mask: Float[Tensor, "#texts #heads #queries #tokens"] | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Float[Tensor, "#texts #heads queries tokens"] | None = None,
    cu_seq_lens_q: Int[Tensor, " bounds"] | None = None,
    shared_tokens: int = 0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "texts queries heads size"], None]:
    """The attention function that Transformers calls by the name `NAME`; it gives no attention weights.

    `cu_seq_lens_q` is where the texts of a single row begin, and where the last one ends, as for flash attention. No
    mask is needed then, nor looked at. The first `shared_tokens` of such a row are the beginning of each of its texts,
    though they stand in the first alone.

    Raises `NotImplementedError` where scores are capped or have sinks beside them.
    """
    if softcap is not None or s_aux is not None:
        raise NotImplementedError("attention with capped scores or sinks")
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    rate = dropout if module.training else 0.0
    if cu_seq_lens_q is None:
        bias = attention_mask if position_bias is None else position_bias
        if position_bias is not None and attention_mask is not None:
            bias = position_bias + attention_mask
        return _together(query, key, value, bias, factor, rate), None
    causal = bool(getattr(module, "is_causal", True))
    if kernels.attends(query, key, value):
        sees = kernels.Sees(causal, (sliding_window or 0) if causal else 0, shared_tokens)
        return _in_one_pass(query, key, value, None, cu_seq_lens_q, sees, factor, rate), None
    lengths, window = cu_seq_lens_q.diff().tolist(), (sliding_window, causal)
    return _one_after_another(query, key, value, lengths, shared_tokens, window, factor, rate), None


def _one_after_another(
    query: Float[Tensor, "1 heads all size"],
    key: Float[Tensor, "1 groups all size"],
    value: Float[Tensor, "1 groups all size"],
    lengths: list[int],
    shared: int,
    window: tuple[int | None, bool],
    scaling: float,
    dropout: float,
) -> Float[Tensor, "1 all heads size"]:
    """The attention of texts in one row, each within itself and what all share.

    Neighbours of the same length are computed together.
    """
    alone = 1 if shared else 0  # the first, which has what all share
    runs = [(1, lengths[0])] * alone + [(len([*same]), length) for length, same in groupby(lengths[alone:])]
    sizes = [texts * length for texts, length in runs]
    rows = [torch.split(x.squeeze(0), sizes, 1) for x in (query, key, value)]
    outputs = []
    for place, (run, *both) in enumerate(zip(runs, *rows, strict=True)):
        before = shared if place else 0
        q, k, v = (torch.unflatten(x, 1, run).transpose(0, 1) for x in both)
        if before:
            k, v = (
                torch.cat((x[:, :, :before].expand(len(own), -1, -1, -1), own), 2) for x, own in ((key, k), (value, v))
            )
        seen = _visible(before + run[1], *window, q.dtype, q.device)
        seen = None if seen is None else seen[:, :, before:]
        outputs.append(_together(q, k, v, seen, scaling, dropout).flatten(0, 1))
    return torch.cat(outputs)[None]


def _together(
    query: Float[Tensor, "texts heads queries size"],
    key: Float[Tensor, "texts groups tokens size"],
    value: Float[Tensor, "texts groups tokens size"],
    bias: Float[Tensor, "#texts #heads #queries #tokens"] | None,
    scaling: float,
    dropout: float,
) -> Float[Tensor, "texts queries heads size"]:
    """The attention of texts side by side."""
    texts, heads, queries, size = query.shape
    groups, tokens = key.shape[1], key.shape[2]
    if bias is not None:  # by group, or the same for all
        # The least number of fp32 would be minus infinity in 16 bits, and padding that sees nothing no number at all.
        bias = bias.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
        bias = torch.unflatten(bias, 1, (groups if bias.shape[1] == heads > 1 else 1, -1))
    if kernels.attends(query, key, value) and not (bias is not None and bias.requires_grad):
        return _in_one_pass(query, key, value, bias, None, kernels.Sees(), scaling, dropout)
    shape = (texts, groups, heads // groups, queries, tokens)
    mask = draw(shape, dropout, query) if dropout > 0 else None
    side_by_side = query.reshape(texts, groups, heads // groups * queries, size)
    output: Tensor = _Attend.apply(side_by_side, key, value, bias, mask, scaling, dropout, queries)  # type: ignore[no-untyped-call]
    return output.view(texts, heads, queries, size).transpose(1, 2).contiguous()


def _in_one_pass(
    query: Float[Tensor, "texts heads queries size"],
    key: Float[Tensor, "texts groups tokens size"],
    value: Float[Tensor, "texts groups tokens size"],
    bias: Float[Tensor, "#texts #groups #each #queries tokens"] | None,
    bounds: Int[Tensor, " bounds"] | None,
    sees: kernels.Sees,
    scaling: float,
    dropout: float,
) -> Float[Tensor, "texts queries heads size"]:
    """The attention of texts side by side, or of those that a row has between bounds, in a compiled loop."""
    seed = draw((), dropout, query) if dropout > 0 else 0
    output: Tensor = _InOnePass.apply(query, key, value, bias, bounds, sees, scaling, dropout, seed)  # type: ignore[no-untyped-call]
    return output


class _InOnePass(torch.autograd.Function):
    """`kernels.attention`, which keeps its inputs and two numbers for each query and head."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        bounds: Tensor | None,
        *how: Any,
    ) -> Float[Tensor, "texts queries heads size"]:
        output, tops = kernels.attention(query, key, value, bias, bounds, *how)
        ctx.save_for_backward(query, key, value, bias, bounds, tops)
        ctx.how = how
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "texts queries heads size"]) -> tuple[Any, ...]:
        query, key, value, bias, bounds, tops = ctx.saved_tensors
        rest = *ctx.how, gradient, tops
        found = kernels.attention_backward(query, key, value, bias, bounds, *rest)
        return *(one.transpose(1, 2) for one in found), *[None] * 6


@lru_cache(maxsize=16)  # every layer asks for the same few
@torch.inference_mode(False)
def _visible(
    length: int, window: int | None, causal: bool, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "1 1 length length"] | None:
    """Minus infinity where a token would see one after it, or one that has left its window."""
    if not causal:
        return None
    later = torch.full((1, 1, length, length), -torch.inf, dtype=dtype, device=device)
    return later.triu(1) if window is None else later.triu(1) + later.tril(-window)


class _Attend(torch.autograd.Function):
    """softmax(Q Kᵀ · scaling + bias) V for queries side by side (texts, groups, heads of a group · queries, size)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "texts groups rows size"],
        key: Float[Tensor, "texts groups tokens size"],
        value: Float[Tensor, "texts groups tokens size"],
        bias: Float[Tensor, "#texts #groups #each queries tokens"] | None,
        mask: Mask | None,
        scaling: float,
        dropout: float,
        queries: int,
    ) -> Float[Tensor, "texts groups rows size"]:
        query, key, value = (x.contiguous() for x in (query, key, value))  # once, for the backward pass too
        weights = _softmax_(torch.unflatten(query @ key.transpose(2, 3), 2, (-1, queries)), bias, scaling)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scaling, ctx.dropout, ctx.mask = scaling, dropout, mask
        ctx.bias = None if bias is None else bias.shape
        return _dropped(weights, mask, dropout).flatten(2, 3) @ value

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "texts groups rows size"]) -> tuple[Any, ...]:
        query, key, value, weights = ctx.saved_tensors
        to_value = _dropped(weights, ctx.mask, ctx.dropout).flatten(2, 3).transpose(2, 3) @ gradient
        to_weights = (gradient @ value.transpose(2, 3)).view_as(weights)
        to_products = _softmax_backward_(_dropped(to_weights, ctx.mask, ctx.dropout), weights, ctx.scaling)
        to_bias = to_products.sum_to_size(ctx.bias).div_(ctx.scaling) if ctx.needs_input_grad[3] else None
        products = to_products.flatten(2, 3)
        to_query = products @ key if ctx.needs_input_grad[0] else None
        to_key = products.transpose(2, 3) @ query if ctx.needs_input_grad[1] else None
        return to_query, to_key, to_value, to_bias, None, None, None, None


def _dropped(x: Tensor, mask: Mask | None, dropout: float) -> Tensor:
    return x if mask is None else dropped(x, mask, dropout)


def _softmax_(
    products: Float[Tensor, "texts groups each queries tokens"],
    bias: Float[Tensor, "#texts #groups #each queries tokens"] | None,
    scaling: float,
) -> Float[Tensor, "texts groups each queries tokens"]:
    """The weights of scores, products · scaling + bias, in the place of the products."""
    scores = products.mul_(scaling) if bias is None else products.mul_(scaling).add_(bias)
    if not _some_rows_at_a_time(scores):
        return scores.softmax(-1)
    for rows in _parts(scores):
        rows.copy_(rows.float().softmax(-1))
    return scores


def _softmax_backward_(
    gradient: Float[Tensor, "*shape tokens"], weights: Float[Tensor, "*shape tokens"], scaling: float
) -> Float[Tensor, "*shape tokens"]:
    """The gradient of the products, given that of the weights, in its place."""
    if not _some_rows_at_a_time(weights):
        return torch._softmax_backward_data(gradient, weights, -1, weights.dtype).mul_(scaling)
    for rows, outputs in zip(_parts(gradient), _parts(weights), strict=True):
        rows.copy_(torch._softmax_backward_data(rows.float(), outputs.float(), -1, torch.float32).mul_(scaling))
    return gradient


def _parts(x: Float[Tensor, "*shape tokens"]) -> tuple[Float[Tensor, "rows tokens"], ...]:
    return torch.split(x.flatten(0, -2), max(1, _AT_ONCE // x.shape[-1]))


def _some_rows_at_a_time(x: Float[Tensor, "*shape tokens"]) -> bool:
    """Whether x goes through fp32: softmax in bf16 is several times as slow where rows do not fill registers."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.shape[-1] % _LANES != 0


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)
