"""Rotary positions on a CPU in one pass, forward and backward.

Su et al. 2021, arXiv 2104.09864, equation 34, with the pairs as Transformers' Llama has them: number i of a head's
first half with number i of its second. Transformers makes two products, a turned copy and a sum of queries and of keys.
"""

import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltatune import kernels

_NAME = "apply_rotary_pos_emb"
Apply = Callable[..., tuple[Tensor, Tensor]]
"""Takes queries and keys (texts, heads, tokens, size), and cosines and sines (texts, tokens, size)."""


def rotated(
    x: Float[Tensor, "texts heads tokens size"],
    cosines: Float[Tensor, "#texts tokens size"],
    sines: Float[Tensor, "#texts tokens size"],
) -> Float[Tensor, "texts heads tokens size"]:
    """x · cos + [−x₂, x₁] · sin, laid out as queries come: token by token."""
    texts, heads, tokens, size = x.shape
    rows = x.transpose(1, 2).reshape(texts * tokens, heads, size)
    each = [angles.expand(texts, -1, -1).reshape(texts * tokens, size) for angles in (cosines, sines)]
    y: Tensor = _Rotated.apply(rows, *each)  # type: ignore[no-untyped-call]
    return y.view(texts, tokens, heads, size).transpose(1, 2)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return kernels.rotate(x, cosines, sines, back=False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return kernels.rotate(dy, cosines, sines, back=True), None, None


def replace_rotations(model: nn.Module) -> None:
    """Lets every attention of the model that rotates its queries and keys by such pairs do it in one pass.

    Its forward pass stays Transformers' own, and finds ours where it looks for the function that rotates.
    """
    for module in model.modules():
        forward = type(module).forward
        if isinstance(forward, FunctionType) and _NAME in forward.__code__.co_names:
            apply = forward.__globals__[_NAME]
            if _turns_halves(apply):
                names = {**forward.__globals__, _NAME: _in_one_pass(apply)}
                quick = FunctionType(
                    forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
                )
                quick.__kwdefaults__ = forward.__kwdefaults__
                module.forward = MethodType(quick, module)


def has_rotations(model: nn.Module) -> bool:
    """Whether an attention of the model rotates in one pass."""
    forwards = (getattr(vars(module).get("forward"), "__func__", None) for module in model.modules())
    finds = (one.__globals__.get(_NAME) for one in forwards if isinstance(one, FunctionType))
    return any(getattr(one, "__module__", "") == __name__ for one in finds)


@cache
def _in_one_pass(apply: Apply) -> Apply:
    def rotate_both(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **options: Any) -> Any:
        if args or options or not kernels.ready(query, key, cos, sin) or cos.shape[-1] != query.shape[-1]:
            return apply(query, key, cos, sin, *args, **options)
        return rotated(query, cos, sin), rotated(key, cos, sin)

    return rotate_both


@cache
def _turns_halves(apply: Apply) -> bool:
    """Whether a function does what ours does, tried out on a few numbers."""
    if list(inspect.signature(apply).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    x = torch.linspace(-2, 3, 2 * 3 * 4 * 8, device="cpu").view(2, 3, 4, 8)
    angles = torch.linspace(-1, 2, 2 * 4 * 4, device="cpu").view(2, 4, 4).repeat(1, 1, 2)
    try:
        theirs = apply(x, x[:, :1], angles.cos(), angles.sin())
    except (RuntimeError, TypeError, ValueError):
        return False
    ours = (rotated(one, angles.cos(), angles.sin()) for one in (x, x[:, :1]))
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(theirs, ours, strict=True))
