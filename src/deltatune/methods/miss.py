"""MiSS: one small trained matrix, repeated along the input, is added to a frozen weight.

Kang and Yin 2024, arXiv 2409.15371.   W'[:, j] = W[:, j] + D[j mod rank],   D (rank, out)

    W' = W + [Dᵀ Dᵀ Dᵀ …]     the last copy is cut where rank does not divide in

Inputs that are a multiple of `rank` apart share a row of D, so it is enough to add them up first:

    x ──┬─────────────── W ──────────────┬── y
        └── Σ of those that share ── D ──┘

There is no scale. The variants that PEFT calls "bat" and "mini" are other formulas, and are not read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltatune.dropout import dropout
from deltatune.errors import UserError
from deltatune.methods.contract import CONFIG, Site, Targets, WeightDelta
from deltatune.methods.values import at_least_one, refuse_unsupported, share
from deltatune.weights import FrozenWeight


@dataclass(frozen=True)
class MiSS(WeightDelta):
    """Adds one small trained matrix to frozen weights, repeated along their input."""

    rank: int = 64
    """Rows of the trained matrix D (rank, out); inputs that are a multiple of it apart share one."""
    dropout: float = 0.0
    """Share of the adapter branch's input that is zeroed in training."""
    targets: Targets = "all-linear"
    """Layers to adapt: all-linear, attention, attention-qv, mlp, module names or regular expressions."""

    name: ClassVar[str] = "miss"
    title: ClassVar[str] = "MiSS"
    paper: ClassVar[str] = "arXiv 2409.15371"
    learning_rate: ClassVar[float] = 3e-4
    grows_by: ClassVar[str] = "rank"
    peft_type: ClassVar[str] = "MISS"
    suffixes: ClassVar[Mapping[str, str]] = {"miss_block": "D"}
    __pydantic_config__ = CONFIG

    def __post_init__(self) -> None:
        at_least_one("miss", rank=self.rank)
        share("miss", dropout=self.dropout)

    def check(self, site: Site) -> None:
        """Raises `UserError` for a rank above the number of inputs: some rows of D would meet no input."""
        if self.rank > site.in_:
            raise UserError(
                f"miss: rank {self.rank} is more than the {site.in_} inputs of a {site.out}×{site.in_} weight",
                f"the largest is {site.in_}",
            )

    def parameters(self, site: Site) -> int:
        """Trained parameters of one site: D."""
        return self.rank * site.out

    def delta(
        self, site: Site, weight: FrozenWeight, shared: nn.Module | None, generator: torch.Generator
    ) -> "MiSSDelta":
        """A fresh matrix of zeros, so that training starts at the base."""
        return MiSSDelta(site, self)

    def to_peft(self, modules: Mapping[str, Any], deltas: Mapping[str, nn.Module]) -> dict[str, Any]:
        """PEFT's MissConfig fields."""
        return {"r": self.rank, "miss_dropout": self.dropout, "init_weights": True, "bias": "none"}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "MiSS":
        """Reads PEFT's MissConfig fields; refuses the variants that are other formulas, and trained biases."""
        refuse_unsupported("MiSS", config, {"bias": "none"})
        if config.get("init_weights") in ("bat", "mini"):
            raise UserError(
                f"this MiSS adapter is of the variant {config['init_weights']!r}, which is not supported",
                "only the default is: init_weights=True",
            )
        return cls(rank=config.get("r", 64), dropout=config.get("miss_dropout", 0.0))


class MiSSDelta(nn.Module):
    """D (rank, out) over one frozen weight."""

    def __init__(self, site: Site, method: MiSS) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.zeros(method.rank, site.out))
        self.dropout = method.dropout

    def merged(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W + [Dᵀ Dᵀ …], in the type of W."""
        column = torch.arange(weight.shape[1], device=weight.device) % self.D.shape[0]
        return weight + self.D.T[:, column].to(weight.dtype)

    def forward(
        self, x: Float[Tensor, "tokens in"], weight: FrozenWeight, bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        """The same output from the sums of the inputs that share a row, the weight left alone."""
        z = dropout(x, self.dropout) if self.training and self.dropout > 0 else None
        y: Tensor = _Shared.apply(x, z, weight, bias, self.D.to(x.dtype))  # type: ignore[no-untyped-call]
        return y


class _Shared(torch.autograd.Function):
    """y = x·Wᵀ + b + h·D, h = z·Sᵀ, where z is the dropped input, or x itself when it is None; S as in `_sharing`.

    Backward, with dh = dy·Dᵀ:   dx = dy·W (+ dh·S),  dz = dh·S,  dD = hᵀ·dy,  db = Σ dy
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor | None, weight: FrozenWeight, bias: Tensor | None, D: Tensor) -> Tensor:
        h = (x if z is None else z) @ _sharing(D, weight.in_).T  # (tokens, rank)
        ctx.save_for_backward(h, D)
        ctx.weight, ctx.dropped = weight, z is not None
        return weight.matmul(x, bias).addmm_(h, D)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, D = ctx.saved_tensors
        wants_x, wants_z, _, wants_bias, _ = ctx.needs_input_grad
        dh, S = dy @ D.T, _sharing(D, ctx.weight.in_)
        dx = ctx.weight.matmul_transposed(dy) if wants_x else None
        if dx is not None and not ctx.dropped:
            dx.addmm_(dh, S)
        dz = dh @ S if wants_z else None
        return dx, dz, None, dy.sum(0) if wants_bias else None, h.T @ dy


def _sharing(D: Float[Tensor, "rank out"], in_: int) -> Float[Tensor, "rank {in_}"]:
    """S (rank, in): 1 where an input has a row of D, otherwise 0. A product with it is faster than sums over a view."""
    rank = len(D)
    return torch.eye(rank, dtype=D.dtype, device=D.device).repeat(1, -(-in_ // rank))[:, :in_]
