"""HiRA: a frozen weight whose every entry is scaled by one plus an entry of a trained low-rank product.

Huang et al., ICLR 2025 (openreview TwJrTz9cRS).   W' = W + W ⊙ (B·A) = W ⊙ (1 + B·A)

    x ──┬────────────── W ─────┬── y
        └── drop ── W ⊙ (B·A) ─┘

The update has about the rank of W, whatever that of B·A, and so no thin form: ΔW = W ⊙ (B·A) is made whole in forward
and again in backward, as the definition demands; nothing of its size is kept in between.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltatune.dropout import dropout
from deltatune.methods.contract import CONFIG, Site, Targets, WeightDelta
from deltatune.methods.through import through_update
from deltatune.methods.values import at_least_one, rank_fits, share
from deltatune.weights import FrozenWeight


@dataclass(frozen=True)
class HiRA(WeightDelta):
    """Trains a low-rank product that scales the entries of frozen weights: W' = W ⊙ (1 + B·A)."""

    rank: int = 32
    """Width of the product: B is (out, rank), A is (rank, in)."""
    dropout: float = 0.0
    """Share of the update's input that is zeroed in training."""
    targets: Targets = "all-linear"
    """Layers to adapt: all-linear, attention, attention-qv, mlp, module names or regular expressions."""

    name: ClassVar[str] = "hira"
    title: ClassVar[str] = "HiRA"
    paper: ClassVar[str] = "ICLR 2025, openreview TwJrTz9cRS"
    learning_rate: ClassVar[float] = 1e-2
    grows_by: ClassVar[str] = "rank"
    peft_type: ClassVar[str] = "HIRA"
    suffixes: ClassVar[Mapping[str, str]] = {"hira_A": "A", "hira_B": "B"}
    __pydantic_config__ = CONFIG

    def __post_init__(self) -> None:
        at_least_one("hira", rank=self.rank)
        share("hira", dropout=self.dropout)

    def check(self, site: Site) -> None:
        """Raises `UserError` for a rank above min(out, in): B·A could not use it."""
        rank_fits("hira", self.rank, site)

    def parameters(self, site: Site) -> int:
        """Trained parameters of one site: A and B."""
        return self.rank * (site.out + site.in_)

    def delta(
        self, site: Site, weight: FrozenWeight, shared: nn.Module | None, generator: torch.Generator
    ) -> "HiRADelta":
        """A fresh pair of matrices whose product is zero: A uniform in ±1/√in and B zero."""
        return HiRADelta(site, self, generator)

    def to_peft(self, modules: Mapping[str, Any], deltas: Mapping[str, nn.Module]) -> dict[str, Any]:
        """PEFT's HiraConfig fields."""
        return {"r": self.rank, "hira_dropout": self.dropout, "init_weights": True}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "HiRA":
        """Reads PEFT's HiraConfig fields but rank_pattern: PEFT makes and loads every layer with r all the same."""
        return cls(rank=config.get("r", 32), dropout=config.get("hira_dropout", 0.0))


class HiRADelta(nn.Module):
    """A (rank, in) and B (out, rank) over one frozen weight."""

    def __init__(self, site: Site, method: HiRA, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(site.in_)
        self.A = nn.Parameter(torch.empty(method.rank, site.in_).uniform_(-bound, bound, generator=generator))
        self.B = nn.Parameter(torch.zeros(site.out, method.rank))
        self.dropout = method.dropout

    def merged(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W ⊙ (1 + B·A), in the type of W."""
        return (weight * (1 + self.B @ self.A)).to(weight.dtype)

    def forward(
        self, x: Float[Tensor, "tokens in"], weight: FrozenWeight, bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        """The same output through a passing ΔW."""

        def update(B: Float[Tensor, "out rank"], A: Float[Tensor, "rank in"]) -> Float[Tensor, "out in"]:
            return weight.dense() * (B @ A)

        dropped = dropout(x, self.dropout) if self.training and self.dropout > 0 else None
        return through_update(x, weight, bias, update, self.B, self.A, dropped=dropped)
