"""OFT: the inputs of a frozen weight are turned, block by block, before it is applied.

Qiu et al. 2023, arXiv 2306.07280, section 3.   W' = W·blockdiag(R₁, …, R_b)ᵀ

                 ┌─ R₁ ─┐
    x ── blocks ─┤  ⋮   ├── W ── y          R = (I − Q)(I + Q)⁻¹,   Q = U − Uᵀ,   U strictly upper triangular: trained
                 └─ R_b ┘

A rotation keeps the lengths of the rows of W and the angles between them. From OFTv2 (Qiu et al. 2025, arXiv
2506.19847) is that the inputs are turned, not W, and, with `neumann_terms`, a truncated series in place of the inverse:

    R ≈ (I + Q)(I + Q + Q² + …)

The paper has (I + Q)(I − Q)⁻¹, as the series does: with −Q for Q the same rotations. The signs here are those of PEFT's
files.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltatune.errors import UserError
from deltatune.methods.contract import CONFIG, Site, Targets, WeightDelta
from deltatune.methods.values import at_least_one, refuse_unsupported
from deltatune.weights import FrozenWeight


@dataclass(frozen=True)
class OFT(WeightDelta):
    """Trains rotations of a frozen weight's inputs, block by block: W' = W·blockdiag(R)ᵀ with each R orthogonal."""

    block_size: int = 32
    """Inputs that are turned together; it has to divide the inputs of each layer."""
    blocks: int | None = None
    """Number of blocks of each layer; where it is given, it decides in place of block_size."""
    adjust: bool = False
    """Where block_size or blocks does not divide a layer's inputs, take the nearest divisor, as PEFT does."""
    block_share: bool = False
    """One rotation for all blocks of a layer."""
    neumann_terms: int | None = None
    """Terms of a series in place of the inverse, which makes R nearly orthogonal; PEFT's default is 5."""
    targets: Targets = "all-linear"
    """Layers to adapt: all-linear, attention, attention-qv, mlp, module names or regular expressions."""

    name: ClassVar[str] = "oft"
    title: ClassVar[str] = "OFT"
    paper: ClassVar[str] = "arXiv 2306.07280"
    learning_rate: ClassVar[float] = 2e-3
    grows_by: ClassVar[str] = "block_size"
    peft_type: ClassVar[str] = "OFT"
    suffixes: ClassVar[Mapping[str, str]] = {"oft_R.weight": "Q"}
    __pydantic_config__ = CONFIG

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise UserError(f"oft: block_size must be at least 2, not {self.block_size}", "a block of 1 cannot turn")
        if self.blocks is not None:
            at_least_one("oft", blocks=self.blocks)
        if self.neumann_terms is not None and self.neumann_terms < 4:
            raise UserError(
                f"oft: neumann_terms must be at least 4, not {self.neumann_terms}",
                "5 is PEFT's default; leave it out for the exact inverse",
            )

    def size(self, site: Site) -> int:
        """Width k of a block of that site."""
        asked = self.block_size if self.blocks is None else self.blocks
        below, above = _divisors_around(site.in_, asked)
        divisor = below if asked - below <= above - asked else above
        return divisor if self.blocks is None else site.in_ // divisor

    def check(self, site: Site) -> None:
        """Raises `UserError` where blocks do not divide the inputs, or are so small that they cannot turn."""
        name, asked = ("block_size", self.block_size) if self.blocks is None else ("blocks", self.blocks)
        below, above = _divisors_around(site.in_, asked)
        if below != asked and not self.adjust:
            near = f"{below} and {above}" if above > asked else f"{below}"
            raise UserError(
                f"oft: {name} {asked} does not divide {site.in_}, the inputs of {site.path or 'a layer'}",
                f"the nearest that do: {near}; adjust=true takes the nearest of each layer",
            )
        if self.size(site) < 2:
            raise UserError(
                f"oft: {name} {asked} makes blocks of 1 of {site.in_} inputs, which cannot turn",
                f"{site.in_ // 2} blocks of 2 are the most" if site.in_ % 2 == 0 else "leave that layer out",
            )

    def parameters(self, site: Site) -> int:
        """Trained parameters of one site: in·(k − 1) / 2 for blocks of width k, or one block's share of them."""
        size = self.size(site)
        return (1 if self.block_share else site.in_ // size) * (size * (size - 1) // 2)

    def delta(
        self, site: Site, weight: FrozenWeight, shared: nn.Module | None, generator: torch.Generator
    ) -> nn.Module:
        """Fresh rotations by nothing: Q is zero."""
        return OFTDelta(site, self)

    def to_peft(self, modules: Mapping[str, Any], deltas: Mapping[str, nn.Module]) -> dict[str, Any]:
        """PEFT's OFTConfig fields."""
        return {
            "r": self.blocks or 0,
            "oft_block_size": 0 if self.blocks else self.block_size,
            "block_share": self.block_share,
            "use_cayley_neumann": self.neumann_terms is not None,
            "num_cayley_neumann_terms": self.neumann_terms or 5,
            "peft_version": "0.18.0",  # the first whose series is this one: PEFT warns of older files
            "bias": "none",
            "coft": False,
            "init_weights": True,
            "module_dropout": 0.0,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "OFT":
        """Reads PEFT's OFTConfig fields; refuses the ones that would change the output and that we do not have."""
        refuse_unsupported("OFT", config, {"coft": False, "module_dropout": 0.0, "bias": "none"})
        terms = None
        if config.get("use_cayley_neumann", True):
            terms = config.get("num_cayley_neumann_terms", 5)
            terms = 4 if terms == 3 else terms  # PEFT computes the same for both
            _refuse_older_series(config)
        return cls(
            block_size=config.get("oft_block_size", 32) or cls.block_size,
            blocks=config.get("r") or None,
            adjust=True,
            block_share=config.get("block_share", False),
            neumann_terms=terms,
        )


class OFTDelta(nn.Module):
    """Q (blocks, k·(k − 1) / 2) over one frozen weight: each row the upper triangle of a skew-symmetric matrix."""

    def __init__(self, site: Site, method: OFT) -> None:
        super().__init__()
        self.size = method.size(site)
        self.blocks = site.in_ // self.size
        triangle = self.size * (self.size - 1) // 2
        self.Q = nn.Parameter(torch.zeros(1 if method.block_share else self.blocks, triangle))
        self.neumann_terms = method.neumann_terms

    def rotations(self, Q: Float[Tensor, "free triangle"]) -> Float[Tensor, "blocks size size"]:
        """R of each block."""
        R = cayley(skew(Q, self.size), self.neumann_terms)
        return R.expand(self.blocks, -1, -1)

    def merged(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W·blockdiag(R)ᵀ, in the type of W."""
        R = self.rotations(self.Q)
        blocks = weight.to(R.dtype).view(len(weight), -1, self.size)
        return torch.einsum("obk,bik->obi", blocks, R).flatten(1).to(weight.dtype)

    def forward(
        self, x: Float[Tensor, "tokens in"], weight: FrozenWeight, bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        """The same output with the input turned in place of the weight."""
        y: Tensor = _Turned.apply(x, weight, bias, self.Q, self.rotations)  # type: ignore[no-untyped-call]
        return y


def skew(upper: Float[Tensor, "blocks triangle"], size: int) -> Float[Tensor, "blocks size size"]:
    """U − Uᵀ for each strictly upper triangle, given row by row."""
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    U = upper.new_zeros(len(upper), size, size)
    U[:, rows, columns] = upper
    return U - U.mT


def cayley(Q: Float[Tensor, "blocks size size"], neumann_terms: int | None) -> Float[Tensor, "blocks size size"]:
    """(I − Q)(I + Q)⁻¹, or (I + Q)(I + Q + … ): the polynomial with so many terms, I the first of them."""
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    if neumann_terms is None:
        # I + Q can be inverted for every skew Q; what is not finite may pass, and is refused where it matters.
        R: Tensor = torch.linalg.solve_ex(identity + Q, identity - Q, left=False)[0]
        return R
    series = identity + Q
    for _ in range(neumann_terms - 3):
        series = identity + Q @ series
    return series + Q @ series


class _Turned(torch.autograd.Function):
    """y = x̃·Wᵀ + b,   x̃ = x·blockdiag(R).

    Backward:   dx̃ = dy·W,  dx = dx̃·blockdiag(R)ᵀ,  dR = xᵀ·dx̃ of each block,  db = Σ dy,  and dQ through `rotations`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: FrozenWeight,
        bias: Tensor | None,
        Q: Tensor,
        rotations: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(x, Q)
        ctx.weight, ctx.rotations = weight, rotations
        R = rotations(Q).to(x.dtype)
        return weight.matmul(_joined(_blocks(x, R.shape[-1]) @ R), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, Q = ctx.saved_tensors
        wants_x, _, wants_bias, *_ = ctx.needs_input_grad
        with torch.enable_grad():
            Q = Q.detach().requires_grad_()
            R = ctx.rotations(Q)
        # Copies, because products along the tokens of strided blocks are slow in 16 bits.
        turned = _blocks(ctx.weight.matmul_transposed(dy), R.shape[-1]).contiguous()
        dR = _blocks(x, R.shape[-1]).contiguous().mT @ turned
        [dQ] = torch.autograd.grad(R, Q, dR.to(R.dtype))
        dx = _joined(turned @ R.detach().mT.to(dy.dtype)) if wants_x else None
        return dx, None, dy.sum(0) if wants_bias else None, dQ, None


def _blocks(x: Float[Tensor, "tokens in"], size: int) -> Float[Tensor, "blocks tokens size"]:
    return x.view(len(x), -1, size).transpose(0, 1)


def _joined(blocks: Float[Tensor, "blocks tokens size"]) -> Float[Tensor, "tokens in"]:
    return blocks.transpose(0, 1).flatten(1)


@cache
def _divisors_around(number: int, near: int) -> tuple[int, int]:
    """The largest divisor up to `near` and the smallest one from it on; the number itself where there is none."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = [*small, *(number // d for d in reversed(small))]  # a square's root twice, which does no harm
    return max(d for d in divisors if d <= near), min((d for d in divisors if d >= near), default=number)


def _refuse_older_series(config: Mapping[str, Any]) -> None:
    version = str(config.get("peft_version") or "0.0")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < (0, 18):
        raise UserError(
            "this OFT adapter has use_cayley_neumann=True from a PEFT before 0.18, whose series was another",
            "train it again",
        )
