"""Entries of a weight: which ones, drawn by a seed as PEFT draws them, and the weight changed at them."""

from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from deltatune.errors import UserError
from deltatune.methods.contract import Site


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # first wanted in an evaluation, they serve training as well
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
