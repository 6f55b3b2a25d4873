"""LoHa: a frozen weight plus the Hadamard product of two trained low-rank products.

Hyeon-Woo et al. 2021 (FedPara), arXiv 2108.06098, proposition 1.   W' = W + s·(W1a·W1b) ⊙ (W2a·W2b),   s = alpha / rank

With the parameters of two LoRAs of that rank, the update has a rank of up to rank². Its factors of that width follow
from its definition, so that for small ranks it is never made: row j of U holds all products of an entry of row j of W1a
and one of W2a, and column k of V likewise (they are Khatri–Rao products):

    (W1a·W1b) ⊙ (W2a·W2b) = U·V      U (out, rank²),   V (rank², in)

Where that would cost more than ΔW itself (`LoHa.by_factors`), ΔW is made whole in forward and in backward, never kept.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltatune.methods.contract import CONFIG, Site, Targets, WeightDelta
from deltatune.methods.low_rank import low_rank
from deltatune.methods.through import through_update
from deltatune.methods.values import at_least_one, positive, rank_fits, refuse_unsupported
from deltatune.weights import FrozenWeight


@dataclass(frozen=True)
class LoHa(WeightDelta):
    """Trains two low-rank products whose Hadamard product is added: W' = W + (alpha / rank)·(W1a·W1b) ⊙ (W2a·W2b)."""

    rank: int = 8
    """Width of each of the two products; that of the update is up to its square."""
    alpha: float | None = None
    """Size of the update: it is scaled by alpha / rank. Left out: the rank."""
    targets: Targets = "all-linear"
    """Layers to adapt: all-linear, attention, attention-qv, mlp, module names or regular expressions."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks for some targets, such as {mlp: 16}."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Other alphas for some targets."""

    name: ClassVar[str] = "loha"
    title: ClassVar[str] = "LoHa"
    paper: ClassVar[str] = "arXiv 2108.06098"
    learning_rate: ClassVar[float] = 1e-2
    grows_by: ClassVar[str] = "rank"
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "rank", "alpha_pattern": "alpha"}
    peft_type: ClassVar[str] = "LOHA"
    suffixes: ClassVar[Mapping[str, str]] = {
        "hada_w1_a": "w1_a",
        "hada_w1_b": "w1_b",
        "hada_w2_a": "w2_a",
        "hada_w2_b": "w2_b",
    }
    __pydantic_config__ = CONFIG

    def __post_init__(self) -> None:
        at_least_one("loha", rank=(self.rank, *self.rank_pattern.values()))
        positive("loha", alpha=(self.alpha, *self.alpha_pattern.values()))

    @property
    def _alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def scale(self) -> float:
        """s in W' = W + s·(W1a·W1b) ⊙ (W2a·W2b)."""
        return self._alpha / self.rank

    def by_factors(self, site: Site) -> bool:
        """Whether U and V are used in place of ΔW.

        Beside the two frozen products, a step has six products of width rank² with them; with ΔW it has one more of W's
        size in 32 bits, and three in 16. The rule stands between the two.
        """
        return 2 * self.rank**2 * (site.out + site.in_) <= site.out * site.in_

    def check(self, site: Site) -> None:
        """Raises `UserError` for a rank above min(out, in): a product could not use it."""
        rank_fits("loha", self.rank, site)

    def parameters(self, site: Site) -> int:
        """Trained parameters of one site: two pairs of thin matrices."""
        return 2 * self.rank * (site.out + site.in_)

    def delta(
        self, site: Site, weight: FrozenWeight, shared: nn.Module | None, generator: torch.Generator
    ) -> "LoHaDelta":
        """Four fresh matrices whose update is zero: W2b is zero, the others uniform in ±1/√columns."""
        return LoHaDelta(site, self, generator)

    def to_peft(self, modules: Mapping[str, Any], deltas: Mapping[str, nn.Module]) -> dict[str, Any]:
        """PEFT's LoHaConfig fields."""
        return {
            "r": self.rank,
            "alpha": self._alpha,
            "rank_pattern": {path: m.rank for path, m in modules.items() if m.rank != self.rank},
            "alpha_pattern": {path: m._alpha for path, m in modules.items() if m._alpha != self._alpha},
            "rank_dropout": 0.0,
            "module_dropout": 0.0,
            "init_weights": True,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "LoHa":
        """Reads PEFT's LoHaConfig fields; refuses its dropouts, which we do not have."""
        refuse_unsupported("LoHa", config, {"rank_dropout": 0.0, "module_dropout": 0.0})
        return cls(
            rank=config.get("r", 8),
            alpha=config.get("alpha", 8),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
        )


class LoHaDelta(nn.Module):
    """W1a and W2a (out, rank), W1b and W2b (rank, in) over one frozen weight."""

    def __init__(self, site: Site, method: LoHa, generator: torch.Generator) -> None:
        super().__init__()

        def uniform(rows: int, columns: int) -> nn.Parameter:
            bound = 1 / math.sqrt(columns)
            return nn.Parameter(torch.empty(rows, columns).uniform_(-bound, bound, generator=generator))

        self.w1_a = uniform(site.out, method.rank)
        self.w1_b = uniform(method.rank, site.in_)
        self.w2_a = uniform(site.out, method.rank)
        self.w2_b = nn.Parameter(torch.zeros(method.rank, site.in_))
        self.scale = method.scale
        self.by_factors = method.by_factors(site)

    def update(
        self,
        w1_a: Float[Tensor, "out rank"],
        w1_b: Float[Tensor, "rank in"],
        w2_a: Float[Tensor, "out rank"],
        w2_b: Float[Tensor, "rank in"],
    ) -> Float[Tensor, "out in"]:
        """ΔW."""
        return self.scale * (w1_a @ w1_b) * (w2_a @ w2_b)

    def merged(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W + s·(W1a·W1b) ⊙ (W2a·W2b), in the type of W."""
        return weight + self.update(self.w1_a, self.w1_b, self.w2_a, self.w2_b).to(weight.dtype)

    def forward(
        self, x: Float[Tensor, "tokens in"], weight: FrozenWeight, bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        """The same output, from U and V or from a passing ΔW."""
        parameters = self.w1_a, self.w1_b, self.w2_a, self.w2_b
        if not self.by_factors:
            return through_update(x, weight, bias, self.update, *parameters)
        U, V = row_products(self.w1_a, self.w2_a), column_products(self.w1_b, self.w2_b)
        return low_rank(x, None, weight, bias, V, U, self.scale)


def row_products(a: Float[Tensor, "rows p"], b: Float[Tensor, "rows q"]) -> Float[Tensor, "rows pq"]:
    """All products of an entry of a row of a with one of the same row of b: the row-wise Khatri–Rao product."""
    return (a[:, :, None] * b[:, None, :]).flatten(1)


def column_products(a: Float[Tensor, "p columns"], b: Float[Tensor, "q columns"]) -> Float[Tensor, "pq columns"]:
    """The same of columns, in the same order: the Khatri–Rao product."""
    return (a[:, None] * b[None]).flatten(0, 1)
