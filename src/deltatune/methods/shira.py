"""SHiRA: a frozen weight of which a few entries train, at random places. The update is sparse, and of high rank.

Bhardwaj et al. 2024, arXiv 2406.13175, section 3 (SHiRA-Rand).   W' = W + ΔW,   ΔW has rank·(out + in) entries, zero
elsewhere.

    x ── W with some entries changed ── y
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltatune.errors import UserError
from deltatune.methods.contract import CONFIG, Site, Targets, WeightDelta
from deltatune.methods.entries import random_places, with_entries
from deltatune.methods.through import through_entries
from deltatune.methods.values import at_least_one
from deltatune.weights import FrozenWeight


@dataclass(frozen=True)
class SHiRA(WeightDelta):
    """Trains a few entries of frozen weights, at random places."""

    rank: int = 32
    """Decides how many: rank·(out + in), as many as LoRA of that rank trains. It does not bound the update's rank."""
    mask_seed: int = 0
    """Decides the places; layers of one shape have the same ones."""
    targets: Targets = "all-linear"
    """Layers to adapt: all-linear, attention, attention-qv, mlp, module names or regular expressions."""

    name: ClassVar[str] = "shira"
    title: ClassVar[str] = "SHiRA"
    paper: ClassVar[str] = "arXiv 2406.13175"
    learning_rate: ClassVar[float] = 2e-3
    grows_by: ClassVar[str] = "rank"
    peft_type: ClassVar[str] = "SHIRA"
    suffixes: ClassVar[Mapping[str, str]] = {"shira_weight": "entries", "shira_indices": "places"}
    __pydantic_config__ = CONFIG

    def __post_init__(self) -> None:
        at_least_one("shira", rank=self.rank)

    def check(self, site: Site) -> None:
        """Raises `UserError` for a rank that asks for more entries than the weight has."""
        most = site.out * site.in_ // (site.out + site.in_)
        if self.rank > most:
            raise UserError(
                f"shira: rank {self.rank} asks for {self.parameters(site)} entries, but a {site.out}×{site.in_} weight "
                f"has {site.out * site.in_}",
                f"the largest rank is {most}" if most else "leave this layer out of the targets",
            )

    def parameters(self, site: Site) -> int:
        """Trained parameters of one site: rank·(out + in) entries."""
        return self.rank * (site.out + site.in_)

    def stored_parameters(self, sites: Sequence[Site]) -> int:
        """A file holds each entry with its row and its column."""
        return 3 * sum(self.parameters(site) for site in sites)

    def delta(
        self, site: Site, weight: FrozenWeight, shared: nn.Module | None, generator: torch.Generator
    ) -> "SHiRADelta":
        """Entries that are all zero, so that training starts at the base."""
        return SHiRADelta(site, self)

    def stored(self, site: Site, delta: nn.Module) -> dict[str, Tensor]:
        """The entries, and their rows and columns as PEFT has them: 32-bit integers (2, entries)."""
        assert isinstance(delta, SHiRADelta)
        indices = torch.stack([delta.places // site.in_, delta.places % site.in_])
        return {"shira_weight": delta.entries, "shira_indices": indices.to(torch.int32)}

    def restore(self, delta: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Takes over the entries and their places. Raises `UserError` for places that the weight does not have."""
        assert isinstance(delta, SHiRADelta)
        rows, columns = tensors["shira_indices"].long()  # PEFT writes them as floats on Windows
        places = rows * delta.in_ + columns
        within = (rows >= 0) & (rows < delta.out) & (columns >= 0) & (columns < delta.in_)
        if not within.all() or len(places.unique()) < len(places):
            raise UserError(
                f"the adapter is damaged: its shira_indices are no different places of a {delta.out}×{delta.in_} weight"
            )
        delta.places.copy_(places)
        delta.entries.copy_(tensors["shira_weight"])

    def to_peft(self, modules: Mapping[str, Any], deltas: Mapping[str, nn.Module]) -> dict[str, Any]:
        """PEFT's ShiraConfig fields."""
        return {"r": self.rank, "mask_type": "random", "random_seed": self.mask_seed, "init_weights": True}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "SHiRA":
        """Reads PEFT's ShiraConfig fields. How the mask was made is of no matter: the file has the places."""
        return cls(rank=config.get("r", 32), mask_seed=config.get("random_seed") or 0)


class SHiRADelta(nn.Module):
    """The trained `entries` over one frozen weight, and their `places` in it (row·in + column)."""

    places: Int[Tensor, " n"]

    def __init__(self, site: Site, method: SHiRA) -> None:
        super().__init__()
        count = method.parameters(site)
        self.out, self.in_ = site.out, site.in_
        self.entries = nn.Parameter(torch.zeros(count))
        drawn = random_places(site.out * site.in_, count, method.mask_seed)
        self.register_buffer("places", drawn.sort().values)  # in PEFT's order, that of the weight

    def merged(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W + ΔW, in the type of W."""
        return with_entries(weight, self.places, self.entries)

    def forward(
        self, x: Float[Tensor, "tokens in"], weight: FrozenWeight, bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        """The same output from a weight that is changed at those entries alone."""
        return through_entries(x, weight, bias, self.places, _themselves, self.entries)


def _themselves(entries: Tensor) -> Tensor:
    return entries
