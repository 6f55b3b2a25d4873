"""Entries of a weight: which ones, drawn by a seed as PEFT draws them, and the product with a weight changed at some.

y = x·W'ᵀ + b,   W' = W but for a few entries, which have something added
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from deltatune.errors import UserError
from deltatune.methods.contract import Site
from deltatune.weights import FrozenWeight

Values = Callable[..., Tensor]
"""Makes what is added to the entries from the trained parameters; differentiable."""


@lru_cache(maxsize=64)
def random_places(entries: int, count: int, seed: int) -> Int[Tensor, " count"]:
    """The first `count` of all `entries` in random order: PEFT's draw. Layers of one shape share it: not to be written.

    Half of PEFT's memory for the same numbers: the order of a draw does not depend on the type it is written in.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.int32 if entries < 2**31 else torch.int64
    return torch.randperm(entries, generator=generator, dtype=dtype)[:count].long()


def count_fits(method: str, count: int, site: Site) -> None:
    """Raises `UserError` for more coefficients than a weight has entries."""
    most = site.out * site.in_
    if count > most:
        raise UserError(
            f"{method}: a {site.out}×{site.in_} weight has no place for {count} coefficients", f"the largest is {most}"
        )


def with_entries(
    weight: Float[Tensor, "out in"], places: Int[Tensor, " entries"], values: Float[Tensor, " entries"]
) -> Float[Tensor, "out in"]:
    """W with `values` added at `places` (row·in + column, each one once), in the type of W; differentiable."""
    update = values.new_zeros(weight.numel()).index_copy(0, places, values).view(weight.shape)
    return weight + update.to(weight.dtype)


def through_entries(
    x: Float[Tensor, "tokens in"],
    weight: FrozenWeight,
    bias: Float[Tensor, " out"] | None,
    places: Int[Tensor, " entries"],
    values: Values,
    *parameters: Tensor,
) -> Float[Tensor, "tokens out"]:
    """x·W'ᵀ + bias, where W' is W with values(*parameters) added at `places` (row·in + column, each one once).

    Kept for backward: x and the parameters; W' is made again there.
    """
    y: Tensor = _Changed.apply(x, weight, bias, places, values, *parameters)  # type: ignore[no-untyped-call]
    return y


class _Changed(torch.autograd.Function):
    """Backward:   dx = dy·W',  dvalues = dyᵀ·x at the places,  db = Σ dy.

    One product with W' does what two, with W and with ΔW, would. In 16 bits it is also the more exact way: W' is
    rounded only where it differs from W, while a sum of two products rounds every output twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: FrozenWeight,
        bias: Tensor | None,
        places: Tensor,
        values: Values,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        ctx.weight, ctx.places, ctx.values = weight, places, values
        changed = _changed(weight, places, values(*parameters), x.dtype)
        return F.linear(x, changed, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        wants_x, _, wants_bias, _, _, *wants = ctx.needs_input_grad
        with torch.enable_grad():
            parameters = [p.detach().requires_grad_(want) for p, want in zip(parameters, wants, strict=True)]
            values = ctx.values(*parameters)
        dx = dy @ _changed(ctx.weight, ctx.places, values.detach(), dy.dtype) if wants_x else None
        bias = dy.sum(0) if wants_bias else None
        wanted = [p for p in parameters if p.requires_grad]
        # The whole dyᵀ·x for a few entries of it: gathering rows for each entry takes ten times as long.
        found = iter(
            torch.autograd.grad(values, wanted, (dy.T @ x).take(ctx.places).to(values.dtype)) if wanted else ()
        )
        return dx, None, bias, None, None, *(next(found) if want else None for want in wants)


def _changed(weight: FrozenWeight, places: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """W' in the given type, in the layout of W; the sums are rounded once."""
    dense = weight.dense()
    return dense.to(dtype, copy=True).put_(places, (dense.take(places) + values).to(dtype))
