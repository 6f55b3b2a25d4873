"""LoRA: a frozen weight plus a trained product of two thin matrices.

Hu et al. 2021, arXiv 2106.09685, section 4.1.   W' = W + s·B·A,   s = alpha / rank

    x ──┬────────── W ─────────┬── y
        └── drop ── A ── B·s ──┘

With `rslora` the scale is alpha / √rank (Kalajdzievski 2023, arXiv 2312.03732), which keeps the size of the update
when the rank grows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltatune.dropout import dropout
from deltatune.errors import UserError
from deltatune.methods.contract import CONFIG, Kind, Targets
from deltatune.weights import FrozenWeight


@dataclass(frozen=True, slots=True)
class LoRA:
    """Adds a trained low-rank product to frozen linear weights: W' = W + (alpha / rank)·B·A."""

    rank: int = 8
    """Width of the update: B is (out, rank), A is (rank, in)."""
    alpha: float | None = None
    """Size of the update: it is scaled by alpha / rank. Left out: twice the rank."""
    dropout: float = 0.0
    """Share of the adapter branch's input that is zeroed in training."""
    rslora: bool = False
    """Scale by alpha / √rank instead."""
    targets: Targets = "all-linear"
    """Layers to adapt: all-linear, attention, attention-qv, mlp, module names or regular expressions."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks for some targets, such as {mlp: 16}."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Other alphas for some targets."""

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    kind: ClassVar[Kind] = "weight delta"
    paper: ClassVar[str] = "arXiv 2106.09685"
    learning_rate: ClassVar[float] = 1e-3
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "rank", "alpha_pattern": "alpha"}
    peft_type: ClassVar[str] = "LORA"
    file_keys: ClassVar[Mapping[str, str]] = {"lora_A.weight": "A", "lora_B.weight": "B"}
    unmergeable: ClassVar[str] = ""
    __pydantic_config__ = CONFIG

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank < 1:
                raise UserError(f"lora: rank must be at least 1, not {rank}")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
                raise UserError(f"lora: alpha must be a positive number, not {alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora: dropout must be at least 0 and below 1, not {self.dropout}")

    @property
    def scale(self) -> float:
        """s in W' = W + s·B·A."""
        return self._alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def _alpha(self) -> float:
        return float(2 * self.rank if self.alpha is None else self.alpha)

    def check(self, out: int, in_: int) -> None:
        """Raises `UserError` for a rank above min(out, in): B·A could not use it."""
        if self.rank > min(out, in_):
            raise UserError(
                f"lora: rank {self.rank} is more than a {out}×{in_} weight has", f"the largest is {min(out, in_)}"
            )

    def parameters(self, out: int, in_: int) -> int:
        """Trained parameters on one (out, in) weight: A and B."""
        return self.rank * (out + in_)

    def kept_for_backward(self, out: int, in_: int, tokens: int, itemsize: int) -> int:
        """Bytes kept for backward: x, x·Aᵀ, A and B; with dropout the dropped x and its mask in place of x."""
        inputs = 2 * in_ if self.dropout else in_
        return (tokens * (inputs + self.rank) + self.parameters(out, in_)) * itemsize

    def delta(self, out: int, in_: int, generator: torch.Generator) -> "LoRADelta":
        """A fresh pair of matrices: A uniform in ±1/√in, B zero, so that training starts at the base."""
        return LoRADelta(out, in_, self.rank, self.scale, self.dropout, generator)

    def to_peft(self, modules: Mapping[str, Any]) -> dict[str, Any]:
        """PEFT's LoraConfig fields."""
        return {
            "r": self.rank,
            "lora_alpha": self._alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "rank_pattern": {path: m.rank for path, m in modules.items() if m.rank != self.rank},
            "alpha_pattern": {path: m._alpha for path, m in modules.items() if m._alpha != self._alpha},
            "init_lora_weights": True,
            "bias": "none",
            "use_dora": False,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "LoRA":
        """Reads PEFT's LoraConfig fields; refuses the ones that would change the output and that we do not have."""
        unsupported = {"use_dora": False, "bias": "none", "lora_bias": False, "alora_invocation_tokens": None}
        for key, plain in unsupported.items():
            if config.get(key, plain) != plain:
                raise UserError(
                    f"this LoRA adapter has {key}={config[key]!r}, which is not supported", "see the changelog"
                )
        return cls(
            rank=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("lora_dropout", 0.0),
            rslora=config.get("use_rslora", False),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
        )


class LoRADelta(nn.Module):
    """A (rank, in) and B (out, rank) over one frozen weight."""

    def __init__(self, out: int, in_: int, rank: int, scale: float, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_)
        self.A = nn.Parameter(torch.empty(rank, in_).uniform_(-bound, bound, generator=generator))
        self.B = nn.Parameter(torch.zeros(out, rank))
        self.scale = scale
        self.dropout = dropout

    def merged(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W + s·B·A, in the type of W."""
        return weight + (self.scale * self.B @ self.A).to(weight.dtype)

    def forward(
        self, x: Float[Tensor, "tokens in"], weight: FrozenWeight, bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        """The same output from two thin products, the weight left alone."""
        z = dropout(x, self.dropout) if self.training and self.dropout > 0 else None
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        y: Tensor = _LowRank.apply(x, z, weight, bias, A, B, self.scale)  # type: ignore[no-untyped-call]
        return y


class _LowRank(torch.autograd.Function):
    """y = x·Wᵀ + b + s·(z·Aᵀ)·Bᵀ, where z is the dropped input, or x itself when it is None.

    Backward, with h = z·Aᵀ and dh = s·dy·B:   dx = dy·W (+ dh·A),  dz = dh·A,  dA = dhᵀ·z,  dB = s·dyᵀ·h,  db = Σ dy
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
        scale: float,
    ) -> Tensor:
        branch = x if z is None else z
        h = branch @ A.T  # (tokens, rank)
        ctx.save_for_backward(branch, A, B, h)
        ctx.weight, ctx.scale, ctx.dropped = weight, scale, z is not None
        return weight.matmul(x, bias).addmm_(h, B.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        branch, A, B, h = ctx.saved_tensors
        wants_x, wants_z, _, wants_bias, *_ = ctx.needs_input_grad
        dh = (dy @ B).mul_(ctx.scale)  # (tokens, rank)
        dx = ctx.weight.matmul_transposed(dy) if wants_x else None
        dz = dh @ A if wants_z else None
        if dx is not None and not ctx.dropped:
            dx.addmm_(dh, A)
        bias = dy.sum(0) if wants_bias else None
        return dx, dz, None, bias, dh.T @ branch, (dy.T @ h).mul_(ctx.scale), None
