"""LoKr: a frozen weight plus a trained Kronecker product.

Yeh et al. 2023 (LyCORIS), arXiv 2309.14859; after Edalati et al. 2022 (KronA), arXiv 2212.10650.

    W' = W + s·W1 ⊗ W2,   s = alpha / rank      W1 (out₁, in₁),   W2 (out₂, in₂),   out = out₁·out₂,   in = in₁·in₂

The second factor, and with `decompose_both` the first, is itself a product of that rank where it is large enough to
gain from it: W2 = W2a·W2b. The update is never made: with an input seen as a matrix X (in₁, in₂), its output is

    W1·X·W2ᵀ  (out₁, out₂) = (W1·(X·W2bᵀ))·W2aᵀ
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltatune.errors import UserError
from deltatune.methods.contract import CONFIG, Site, Targets, WeightDelta
from deltatune.methods.values import at_least_one, positive, refuse_unsupported
from deltatune.weights import FrozenWeight


@dataclass(frozen=True)
class LoKr(WeightDelta):
    """Adds a trained Kronecker product of two small matrices to frozen weights: W' = W + (alpha / rank)·W1 ⊗ W2."""

    rank: int = 8
    """Width of a factor's own product; a factor of at most twice that is trained whole."""
    alpha: float | None = None
    """Size of the update: it is scaled by alpha / rank. Left out: the rank."""
    decompose_factor: int = -1
    """Rows and columns of W1, or at most that many where it does not divide them; -1: about √out and √in."""
    decompose_both: bool = False
    """Make W1 a product, too, where it is large enough."""
    targets: Targets = "all-linear"
    """Layers to adapt: all-linear, attention, attention-qv, mlp, module names or regular expressions."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks for some targets, such as {mlp: 16}."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Other alphas for some targets."""

    name: ClassVar[str] = "lokr"
    title: ClassVar[str] = "LoKr"
    paper: ClassVar[str] = "arXiv 2309.14859"
    learning_rate: ClassVar[float] = 1e-2
    grows_by: ClassVar[str] = "rank"
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "rank", "alpha_pattern": "alpha"}
    peft_type: ClassVar[str] = "LOKR"
    suffixes: ClassVar[Mapping[str, str]] = {
        "lokr_w1": "w1",
        "lokr_w1_a": "w1_a",
        "lokr_w1_b": "w1_b",
        "lokr_w2": "w2",
        "lokr_w2_a": "w2_a",
        "lokr_w2_b": "w2_b",
    }
    __pydantic_config__ = CONFIG

    def __post_init__(self) -> None:
        at_least_one("lokr", rank=(self.rank, *self.rank_pattern.values()))
        positive("lokr", alpha=(self.alpha, *self.alpha_pattern.values()))
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise UserError(
                f"lokr: decompose_factor must be -1 or at least 1, not {self.decompose_factor}",
                "-1 makes both factors about as large",
            )

    @property
    def _alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def scale(self) -> float:
        """s in W' = W + s·W1 ⊗ W2."""
        return self._alpha / self.rank

    def shapes(self, site: Site) -> dict[str, tuple[int, int]]:
        """What trains at a site: each matrix by its name, with its shape."""
        out1, out2 = factorization(site.out, self.decompose_factor)
        in1, in2 = factorization(site.in_, self.decompose_factor)
        return {
            **self._factor("w1", out1, in1, self.decompose_both),
            **self._factor("w2", out2, in2, True),
        }

    def _factor(self, name: str, rows: int, columns: int, decompose: bool) -> dict[str, tuple[int, int]]:
        if decompose and 2 * self.rank < max(rows, columns):
            return {f"{name}_a": (rows, self.rank), f"{name}_b": (self.rank, columns)}
        return {name: (rows, columns)}

    def parameters(self, site: Site) -> int:
        """Trained parameters of one site: W1 and W2, or their own factors."""
        return sum(map(math.prod, self.shapes(site).values()))

    def delta(
        self, site: Site, weight: FrozenWeight, shared: nn.Module | None, generator: torch.Generator
    ) -> "LoKrDelta":
        """Fresh factors whose product is zero: W1 or W1a is zero, the others uniform in ±1/√columns."""
        return LoKrDelta(site, self, generator)

    def stored(self, site: Site, delta: nn.Module) -> dict[str, Tensor]:
        """The matrices that this site has, under PEFT's names."""
        return {f"lokr_{name}": getattr(delta, name) for name in self.shapes(site)}

    def to_peft(self, modules: Mapping[str, Any], deltas: Mapping[str, nn.Module]) -> dict[str, Any]:
        """PEFT's LoKrConfig fields."""
        return {
            "r": self.rank,
            "alpha": self._alpha,
            "decompose_factor": self.decompose_factor,
            "decompose_both": self.decompose_both,
            "rank_pattern": {path: m.rank for path, m in modules.items() if m.rank != self.rank},
            "alpha_pattern": {path: m._alpha for path, m in modules.items() if m._alpha != self._alpha},
            "rank_dropout": 0.0,
            "module_dropout": 0.0,
            "init_weights": True,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "LoKr":
        """Reads PEFT's LoKrConfig fields; refuses its dropouts, which we do not have."""
        refuse_unsupported("LoKr", config, {"rank_dropout": 0.0, "module_dropout": 0.0})
        return cls(
            rank=config.get("r", 8),
            alpha=config.get("alpha", 8),
            decompose_factor=config.get("decompose_factor", -1),
            decompose_both=config.get("decompose_both", False),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
        )


class LoKrDelta(nn.Module):
    """W1 (out₁, in₁) and W2 (out₂, in₂) over one frozen weight, each whole or as two factors."""

    def __init__(self, site: Site, method: LoKr, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = method.scale
        for name, shape in method.shapes(site).items():
            bound = 0.0 if name in ("w1", "w1_a") else 1 / math.sqrt(shape[1])
            initial = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            self.register_parameter(name, nn.Parameter(initial))

    def factors(self, of: Literal["w1", "w2"]) -> list[Tensor]:
        """W1 or W2: one matrix, or the two whose product it is."""
        return [parameter for name, parameter in self.named_parameters() if name.startswith(of)]

    def merged(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W + s·W1 ⊗ W2, in the type of W."""
        w1, w2 = (reduce(torch.matmul, self.factors(of)) for of in ("w1", "w2"))
        return weight + (self.scale * torch.kron(w1, w2)).to(weight.dtype)

    def forward(
        self, x: Float[Tensor, "tokens in"], weight: FrozenWeight, bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        """The same output from products with the factors, the update never made."""
        w1 = reduce(torch.matmul, (factor.to(x.dtype) for factor in self.factors("w1")))
        w2 = (factor.to(x.dtype) for factor in self.factors("w2"))
        y: Tensor = _Kronecker.apply(x, weight, bias, self.scale, w1, *w2)  # type: ignore[no-untyped-call]
        return y


def factorization(dimension: int, factor: int) -> tuple[int, int]:
    """Two numbers with that product: (factor, the other) where it divides.

    Otherwise, and for −1, the pair nearest to the square root whose first number is the smaller and at most `factor`.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    most = math.isqrt(dimension) if factor == -1 else min(factor, math.isqrt(dimension))
    first = max(d for d in range(1, most + 1) if dimension % d == 0)
    return first, dimension // first


class _Kronecker(torch.autograd.Function):
    """y = x·Wᵀ + b + s·vec(W1·X·BᵀAᵀ),   X (in₁, in₂) each row of x, W2 = A·B; without B it is the identity.

    Backward, with Z = X·Bᵀ, H = W1·Z and dH = s·dY·A, summed over the tokens:
    dA = s·dYᵀ·H,  dW1 = dH·Zᵀ,  dZ = W1ᵀ·dH,  dB = dZᵀ·X,  dx = dy·W + vec(dZ·B),  db = Σ dy
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: FrozenWeight,
        bias: Tensor | None,
        scale: float,
        w1: Tensor,
        a: Tensor,
        b: Tensor | None = None,
    ) -> Tensor:
        ctx.save_for_backward(x, w1, a, b)
        ctx.weight, ctx.scale = weight, scale
        y = weight.matmul(x, bias)
        h = w1 @ _inner(x, w1, b)  # (tokens, out₁, width of A)
        y.view(-1, len(a)).addmm_(h.flatten(0, 1), a.T, alpha=scale)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, a, b = ctx.saved_tensors
        wants_x, _, wants_bias, *_ = ctx.needs_input_grad
        z = _inner(x, w1, b)
        rows = dy.reshape(-1, len(a))  # (tokens·out₁, out₂)
        da = (rows.T @ (w1 @ z).flatten(0, 1)).mul_(ctx.scale)
        dh = (rows @ a).mul_(ctx.scale).view(len(x), -1, a.shape[1])  # (tokens, out₁, width of A)
        dw1 = (dh @ z.mT).sum(0)
        dz = (w1.T @ dh).flatten(0, 1)  # (tokens·in₁, width of A)
        db = None if b is None else dz.T @ x.reshape(len(dz), -1)
        dx = None
        if wants_x:
            dx = ctx.weight.matmul_transposed(dy)
            if b is None:
                dx += dz.view_as(dx)
            else:
                dx.view(len(dz), -1).addmm_(dz, b)
        gradients = (dx, None, dy.sum(0) if wants_bias else None, None, dw1, da)
        return gradients if b is None else (*gradients, db)


def _inner(x: Tensor, w1: Tensor, b: Tensor | None) -> Float[Tensor, "tokens in1 width"]:
    """X·Bᵀ for each row of x."""
    X = x.view(len(x), w1.shape[1], -1)
    return X if b is None else X @ b.T
