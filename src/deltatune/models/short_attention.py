"""Attention over short texts on a CPU, as plain batched products that keep little for the backward pass.

Vaswani et al. 2017, arXiv 1706.03762, equation 1. Up to some hundred tokens plain products beat the fused kernel of a
CPU. Transformers' own plain attention repeats the keys and values of grouped queries (Ainslie et al. 2023, arXiv
2305.13245) for each of them, and keeps the scores in several forms. Here the queries of a group stand side by side over
one key, and the weights are kept once, in the type of the values.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from deltatune.dropout import kept

NAME = "deltatune_short"


def attend(
    module: nn.Module,
    query: Float[Tensor, "texts heads queries size"],
    key: Float[Tensor, "texts groups tokens size"],
    value: Float[Tensor, "texts groups tokens size"],
    attention_mask: Float[Tensor, "#texts #heads queries tokens"] | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Float[Tensor, "#texts #heads queries tokens"] | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "texts queries heads size"], None]:
    """The attention function that Transformers calls by the name `NAME`; it gives no attention weights."""
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    texts, heads, queries, size = query.shape
    groups, tokens = key.shape[1], key.shape[2]
    bias = attention_mask if position_bias is None else position_bias
    if position_bias is not None and attention_mask is not None:
        bias = position_bias + attention_mask
    if bias is not None:  # by group, or the same for all
        bias = torch.unflatten(bias.to(query.dtype), 1, (groups if bias.shape[1] == heads > 1 else 1, -1))
    keeps = None
    if dropout > 0 and module.training:
        keeps = kept((texts, groups, heads // groups, queries, tokens), dropout, query.device)
    side_by_side = query.reshape(texts, groups, heads // groups * queries, size)
    factor = size**-0.5 if scaling is None else scaling
    output = _Attend.apply(side_by_side, key, value, bias, keeps, factor, dropout, queries)  # type: ignore[no-untyped-call]
    return output.view(texts, heads, queries, size).transpose(1, 2).contiguous(), None


class _Attend(torch.autograd.Function):
    """softmax(Q Kᵀ · scaling + bias) V for queries side by side (texts, groups, heads of a group · queries, size)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "texts groups rows size"],
        key: Float[Tensor, "texts groups tokens size"],
        value: Float[Tensor, "texts groups tokens size"],
        bias: Float[Tensor, "#texts #groups #each queries tokens"] | None,
        keeps: Bool[Tensor, "texts groups each queries tokens"] | None,
        scaling: float,
        dropout: float,
        queries: int,
    ) -> Float[Tensor, "texts groups rows size"]:
        scores = torch.unflatten((query @ key.transpose(2, 3)).mul_(scaling), 2, (-1, queries))
        if bias is not None:
            scores.add_(bias)
        weights = scores.softmax(-1)
        ctx.save_for_backward(query, key, value, weights, keeps)
        ctx.scaling, ctx.dropout = scaling, dropout
        ctx.bias = None if bias is None else bias.shape
        return _dropped(weights, keeps, dropout).flatten(2, 3) @ value

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "texts groups rows size"]) -> tuple[Any, ...]:
        query, key, value, weights, keeps = ctx.saved_tensors
        to_value = _dropped(weights, keeps, ctx.dropout).flatten(2, 3).transpose(2, 3) @ gradient
        to_weights = (gradient @ value.transpose(2, 3)).view_as(weights)
        to_scores = torch._softmax_backward_data(_dropped(to_weights, keeps, ctx.dropout), weights, -1, weights.dtype)
        to_bias = to_scores.sum_to_size(ctx.bias) if ctx.needs_input_grad[3] else None
        products = to_scores.flatten(2, 3)
        to_query = (products @ key).mul_(ctx.scaling) if ctx.needs_input_grad[0] else None
        to_key = (products.transpose(2, 3) @ query).mul_(ctx.scaling) if ctx.needs_input_grad[1] else None
        return to_query, to_key, to_value, to_bias, None, None, None, None


def _dropped(x: Tensor, keeps: Tensor | None, dropout: float) -> Tensor:
    return x if keeps is None else x * keeps.to(x.dtype).mul_(1 / (1 - dropout))


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)
