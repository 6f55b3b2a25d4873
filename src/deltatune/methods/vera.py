"""VeRA: one pair of random matrices for the whole model, frozen; each layer trains two vectors that scale them.

Kopiczko et al. 2023, arXiv 2310.11454, equation 2.   W' = W + diag(λ_b)·B·diag(λ_d)·A

    x ──┬─────────────── W ───────────────┬── y        A (rank, in) and B (out, rank) are the first columns and rows of
        └── drop ── A ── λ_d ── B ── λ_b ──┘            matrices as large as the largest adapted layer needs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deltatune.dropout import dropout
from deltatune.errors import UserError
from deltatune.methods.contract import CONFIG, Site, Targets, WeightDelta
from deltatune.methods.values import at_least_one, positive, refuse_unsupported, share
from deltatune.weights import FrozenWeight


@dataclass(frozen=True)
class VeRA(WeightDelta):
    """Trains two vectors per layer that scale a pair of frozen random matrices, the same for all layers."""

    rank: int = 256
    """Width of the random matrices; a step of it costs one trained number a layer, so it is far above LoRA's."""
    d_initial: float = 0.1
    """What every entry of λ_d starts at; λ_b starts at 0."""
    projection_seed: int = 0
    """Seed of the random matrices."""
    save_projection: bool = True
    """Save the random matrices as well, safe and large; without them, they are drawn again from their seed."""
    dropout: float = 0.0
    """Share of the adapter branch's input that is zeroed in training."""
    targets: Targets = "all-linear"
    """Layers to adapt: all-linear, attention, attention-qv, mlp, module names or regular expressions."""

    name: ClassVar[str] = "vera"
    title: ClassVar[str] = "VeRA"
    paper: ClassVar[str] = "arXiv 2310.11454"
    learning_rate: ClassVar[float] = 6e-2
    grows_by: ClassVar[str] = "rank"
    peft_type: ClassVar[str] = "VERA"
    suffixes: ClassVar[Mapping[str, str]] = {"vera_lambda_b": "lambda_b", "vera_lambda_d": "lambda_d"}
    shared_suffixes: ClassVar[Mapping[str, str]] = {"vera_A": "A", "vera_B": "B"}
    __pydantic_config__ = CONFIG

    def __post_init__(self) -> None:
        at_least_one("vera", rank=self.rank)
        positive("vera", d_initial=self.d_initial)
        share("vera", dropout=self.dropout)
        if not 0 <= self.projection_seed < 2**63:
            raise UserError(f"vera: projection_seed must be from 0 to 2⁶³ − 1, not {self.projection_seed}")

    def check(self, site: Site) -> None:
        """Every rank fits every layer: one above min(out, in) still gives λ_d more to choose from."""

    def parameters(self, site: Site) -> int:
        """Trained parameters of one site: λ_b and λ_d."""
        return site.out + self.rank

    def stored_parameters(self, sites: Sequence[Site]) -> int:
        """Numbers in a file: the vectors and, unless they are left out, the random matrices."""
        projections = self.rank * sum(_largest(sites)) if self.save_projection else 0
        return sum(map(self.parameters, sites)) + projections

    def share(self, sites: Sequence[Site], generator: torch.Generator) -> "Projections":
        """The random matrices, from a seed of their own: the adapter's file can leave them out."""
        return Projections(self, sites)

    def delta(
        self, site: Site, weight: FrozenWeight, shared: nn.Module | None, generator: torch.Generator
    ) -> "VeRADelta":
        """Fresh vectors: λ_b = 0, so that training starts at the base, and λ_d = d_initial."""
        assert isinstance(shared, Projections)
        return VeRADelta(site, self, shared)

    def stored_shared(self, shared: nn.Module) -> dict[str, Tensor]:
        """The random matrices, if they are to be saved."""
        return super().stored_shared(shared) if self.save_projection else {}

    def to_peft(self, modules: Mapping[str, Any], deltas: Mapping[str, nn.Module]) -> dict[str, Any]:
        """PEFT's VeraConfig fields."""
        return {
            "r": self.rank,
            "d_initial": self.d_initial,
            "projection_prng_key": self.projection_seed,
            "save_projection": self.save_projection,
            "vera_dropout": self.dropout,
            "init_weights": True,
            "bias": "none",
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "VeRA":
        """Reads PEFT's VeraConfig fields; refuses trained biases, which we do not have here."""
        refuse_unsupported("VeRA", config, {"bias": "none"})
        return cls(
            rank=config.get("r", 256),
            d_initial=config.get("d_initial", 0.1),
            projection_seed=config.get("projection_prng_key", 0),
            save_projection=config.get("save_projection", True),
            dropout=config.get("vera_dropout", 0.0),
        )


def _largest(sites: Sequence[Site]) -> tuple[int, int]:
    return max(site.out for site in sites), max(site.in_ for site in sites)


class Projections(nn.Module):
    """A (rank, largest in) and B (largest out, rank): Kaiming-uniform, drawn as PEFT draws them, frozen."""

    A: Tensor
    B: Tensor

    def __init__(self, method: VeRA, sites: Sequence[Site]) -> None:
        super().__init__()
        out, in_ = _largest(sites)
        generator = torch.Generator().manual_seed(method.projection_seed)
        for name, shape in (("A", (method.rank, in_)), ("B", (out, method.rank))):
            bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))  # in PEFT's order, for the same bits
            self.register_buffer(name, torch.empty(shape).uniform_(-bound, bound, generator=generator))
        self._cast: dict[str, tuple[tuple[torch.device, torch.dtype, int], Tensor]] = {}

    @torch.inference_mode(False)
    def cast(self, name: str, dtype: torch.dtype) -> Tensor:
        """A or B in another type. It is frozen, so one copy serves every layer and step until it is loaded anew."""
        stored: Tensor = getattr(self, name)
        if stored.dtype == dtype:
            return stored
        state = (stored.device, dtype, stored._version)
        if name not in self._cast or self._cast[name][0] != state:
            self._cast[name] = (state, stored.to(dtype))
        return self._cast[name][1]


class VeRADelta(nn.Module):
    """λ_b (out,) and λ_d (rank,) over one frozen weight, and the shared random matrices."""

    def __init__(self, site: Site, method: VeRA, projections: Projections) -> None:
        super().__init__()
        self.lambda_b = nn.Parameter(torch.zeros(site.out))
        self.lambda_d = nn.Parameter(torch.full((method.rank,), method.d_initial))
        self.projections = projections
        self.in_ = site.in_
        self.dropout = method.dropout

    @property
    def A(self) -> Float[Tensor, "rank in"]:  # noqa: N802  # the paper's name
        """This layer's columns of the shared A."""
        return self.projections.A[:, : self.in_]

    @property
    def B(self) -> Float[Tensor, "out rank"]:  # noqa: N802
        """This layer's rows of the shared B."""
        return self.projections.B[: self.lambda_b.numel()]

    def merged(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W + diag(λ_b)·B·diag(λ_d)·A, in the type of W."""
        update = (self.lambda_b[:, None] * self.B) @ (self.lambda_d[:, None] * self.A)
        return weight + update.to(weight.dtype)

    def forward(
        self, x: Float[Tensor, "tokens in"], weight: FrozenWeight, bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        """The same output from products of width `rank`, or from one with W', by whichever takes fewer operations."""
        z = dropout(x, self.dropout) if self.training and self.dropout > 0 else None
        A = self.projections.cast("A", x.dtype)[:, : self.in_]
        B = self.projections.cast("B", x.dtype)[: self.lambda_b.numel()]
        y: Tensor = _Scaled.apply(x, z, weight, bias, A, B, self.lambda_b, self.lambda_d)  # type: ignore[no-untyped-call]
        return y


class _Scaled(torch.autograd.Function):
    """y = x·Wᵀ + b + h·Sᵀ with h = z·Aᵀ and S = diag(λ_b)·B·diag(λ_d), for z the dropped input, or None where it is x.

    A and B come in the type of x.

    Both vectors' gradients come from one product, P = B ⊙ (dyᵀ·h):   dλ_b = P·λ_d,  dλ_d = Pᵀ·λ_b. So x is not kept.
    y = x·(W + S·A)ᵀ + b and dx = dy·W + (dy·S)·A, or dy·(W + S·A): by whichever takes fewer operations.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor | None,
        weight: FrozenWeight,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        lambda_b: Tensor,
        lambda_d: Tensor,
    ) -> Tensor:
        h, S = (x if z is None else z) @ A.T, _scaled(B, lambda_b, lambda_d)  # (tokens, rank), (out, rank)
        ctx.save_for_backward(h, lambda_b, lambda_d)
        ctx.weight, ctx.A, ctx.B, ctx.dropped = weight, A, B, z is not None
        if z is None and x.shape[0] > x.shape[1]:
            return F.linear(x, _whole(weight, S, A), None if bias is None else bias.to(x.dtype))
        return weight.matmul(x, bias).addmm_(h, S.T)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, lambda_b, lambda_d = ctx.saved_tensors
        wants_x, wants_z, _, wants_bias, *_ = ctx.needs_input_grad
        A, S = ctx.A, _scaled(ctx.B, lambda_b, lambda_d)
        tokens, (out, in_) = dy.shape[0], (S.shape[0], A.shape[1])
        dx = dz = None
        if wants_x and not ctx.dropped and tokens * (out + in_) > out * in_:
            dx = dy @ _whole(ctx.weight, S, A)
        elif wants_x:
            dx = ctx.weight.matmul_transposed(dy)
            if not ctx.dropped:
                dx.addmm_(dy @ S, A)
        if wants_z:
            dz = (dy @ S) @ A
        bias = dy.sum(0) if wants_bias else None
        P = (dy.T @ h).mul_(ctx.B)  # (out, rank)
        in_b, in_d = P @ lambda_d.to(P.dtype), lambda_b.to(P.dtype) @ P
        return dx, dz, None, bias, None, None, in_b.to(lambda_b.dtype), in_d.to(lambda_d.dtype)


def _scaled(B: Tensor, lambda_b: Tensor, lambda_d: Tensor) -> Tensor:
    return (lambda_b.to(B.dtype)[:, None] * B).mul_(lambda_d.to(B.dtype))


def _whole(weight: FrozenWeight, S: Tensor, A: Tensor) -> Tensor:
    """W' in the type of A."""
    return torch.addmm(weight.dense().to(A.dtype), S, A)
