"""DoRA: LoRA that learns the size and the direction of a weight apart.

Liu et al. 2024, arXiv 2402.09353, equation 5.   W' = m ⊙ V / ‖V‖,   V = W + s·B·A,   m₀ = ‖W‖

    x ──┬────────── W ─────────┬── ⊙ m/n ── y
        └── drop ── A ── B·s ──┘             n_j = ‖V_j‖₂, one for each output

n follows V but gets no gradient (section 4.3). It comes from the thin factors, without the (out, in) product: with
U = W·Aᵀ and G = A·Aᵀ,   n_j² = ‖W_j‖² + 2s·Σ_k U_jk·B_jk + s²·Σ_k (B·G)_jk·B_jk.

Two relatives that circulate under the same name, for comparison:

    scalar-frobenius     W' = m · V / ‖V‖_F          one m for the whole matrix
    normalised-update    W' = W + m ⊙ ΔW / ‖ΔW‖      ΔW = s·B·A; W is left as it is, and m₀ = 0
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltatune import kernels
from deltatune.dropout import dropout
from deltatune.errors import UserError
from deltatune.methods.contract import CONFIG, Site, Targets, WeightDelta
from deltatune.methods.decomposed import decomposed
from deltatune.methods.lora import LoRA
from deltatune.methods.low_rank import low_rank
from deltatune.methods.values import at_least_one, positive, rank_fits, share
from deltatune.weights import FrozenWeight

_SMALL = 8
"""The highest rank for which a loop over W gives the norms sooner than a product (docs/log.md)."""

Magnitude = Literal["per-output-row", "scalar-frobenius", "normalised-update"]


@dataclass(frozen=True)
class DoRA(WeightDelta):
    """Trains the direction of frozen weights by a low-rank product and their magnitude by itself: W' = m ⊙ V / ‖V‖."""

    rank: int = 8
    """Width of the update: B is (out, rank), A is (rank, in)."""
    alpha: float | None = None
    """Size of the update: it is scaled by alpha / rank. Left out: twice the rank."""
    dropout: float = 0.0
    """Share of the low-rank branch's input that is zeroed in training."""
    rslora: bool = False
    """Scale by alpha / √rank instead."""
    magnitude: Magnitude = "per-output-row"
    """What m multiplies: each row of V / ‖V‖ (the paper); V over its Frobenius norm; or each row of ΔW / ‖ΔW‖ alone."""
    targets: Targets = "all-linear"
    """Layers to adapt: all-linear, attention, attention-qv, mlp, embeddings, module names or regular expressions."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks for some targets, such as {mlp: 16}."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Other alphas for some targets."""

    name: ClassVar[str] = "dora"
    title: ClassVar[str] = "DoRA"
    paper: ClassVar[str] = "arXiv 2402.09353"
    learning_rate: ClassVar[float] = 1e-3
    grows_by: ClassVar[str] = "rank"
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "rank", "alpha_pattern": "alpha"}
    embeddings: ClassVar[bool] = True
    detached: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    peft_type: ClassVar[str] = "LORA"
    suffixes: ClassVar[Mapping[str, str]] = {
        "lora_A.weight": "A",
        "lora_B.weight": "B",
        "lora_embedding_A": "A",
        "lora_embedding_B": "B",
        "lora_magnitude_vector": "m",
    }
    __pydantic_config__ = CONFIG

    def __post_init__(self) -> None:
        at_least_one("dora", rank=(self.rank, *self.rank_pattern.values()))
        positive("dora", alpha=(self.alpha, *self.alpha_pattern.values()))
        share("dora", dropout=self.dropout)

    @property
    def plain(self) -> LoRA:
        """The LoRA that has the same hyperparameters."""
        return LoRA(
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            rslora=self.rslora,
            targets=self.targets,
            rank_pattern=self.rank_pattern,
            alpha_pattern=self.alpha_pattern,
        )

    @property
    def scale(self) -> float:
        """s in V = W + s·B·A."""
        return self.plain.scale

    def _magnitudes(self, site: Site) -> int:
        return 1 if self.magnitude == "scalar-frobenius" else site.out

    def check(self, site: Site) -> None:
        """Raises `UserError` for a rank above min(out, in): B·A could not use it."""
        rank_fits("dora", self.rank, site)

    def parameters(self, site: Site) -> int:
        """Trained parameters of one site: A, B and m."""
        return self.rank * (site.out + site.in_) + self._magnitudes(site)

    def stored_parameters(self, sites: Sequence[Site]) -> int:
        """Numbers in a file, which is that of the method that `portable` gives."""
        if self.magnitude == "normalised-update":
            return self.plain.stored_parameters(sites)
        return sum(self.plain.parameters(site) + site.out for site in sites)

    def delta(
        self, site: Site, weight: FrozenWeight, shared: nn.Module | None, generator: torch.Generator
    ) -> "DoRADelta | DoRAEmbedding":
        """Fresh parameters that leave W as it is: A, B as LoRA's and m = ‖W‖.

        Where m multiplies the normalised update, a product that is zero has no direction to learn from: there A and B
        are both random and m is zero.
        """
        return (DoRAEmbedding if site.embedding else DoRADelta)(site, self, weight, generator)

    @torch.no_grad()
    def after_step(self, deltas: Mapping[str, nn.Module], step: int, steps: int) -> None:
        """Computes the norms that the next step needs in one go; those of weights that are decoded wait for it."""
        layers = [one for one in deltas.values() if isinstance(one, _Decomposed)]
        due = [(one, told) for one in layers if (told := one.due()) is not None]
        for dtype in {told.weight.dtype for _, told in due}:
            now = [(one, told) for one, told in due if told.weight.dtype == dtype]
            norms = kernels.updated_norms([told for _, told in now], none=1.0)
            for (one, _), norm in zip(now, norms, strict=True):
                one.keep(norm, one.frozen.version, dtype)

    def stored(self, site: Site, delta: nn.Module) -> dict[str, Tensor]:
        """A, B and m under PEFT's names, as `portable` has them."""
        assert isinstance(delta, _Decomposed)
        A, B = ("lora_embedding_A", "lora_embedding_B") if site.embedding else ("lora_A.weight", "lora_B.weight")
        tensors = {A: delta.A, B: delta.B}
        if self.magnitude == "per-output-row":
            return {**tensors, "lora_magnitude_vector": delta.m}
        with torch.no_grad():
            if self.magnitude == "normalised-update":
                return {**tensors, B: (delta.m / delta.norm(delta.frozen, delta.A.dtype))[:, None] * delta.B}
            rows = delta.rows(delta.frozen, delta.A.dtype)
            return {**tensors, "lora_magnitude_vector": delta.m * rows / torch.linalg.vector_norm(rows)}

    def portable(self) -> WeightDelta:
        """The paper's form where one m is for the whole matrix: m_j = m·n_j / ‖V‖_F. LoRA for the normalised update."""
        if self.magnitude == "normalised-update":
            return self.plain
        return self if self.magnitude == "per-output-row" else replace(self, magnitude="per-output-row")

    def to_peft(self, modules: Mapping[str, Any], deltas: Mapping[str, nn.Module]) -> dict[str, Any]:
        """PEFT's LoraConfig fields."""
        plain = {path: module.plain for path, module in modules.items()}
        return {**self.plain.to_peft(plain, deltas), "use_dora": True}

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Whether it is a LoRA adapter with a magnitude."""
        return config.get("peft_type") == cls.peft_type and bool(config.get("use_dora"))

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "DoRA":
        """Reads PEFT's LoraConfig fields; refuses the ones that would change the output and that we do not have."""
        plain = LoRA.from_peft(config)
        if plain.bias != "none":
            raise UserError(f"this DoRA adapter has bias={config['bias']!r}, which is not supported", "only 'none' is")
        return cls(
            rank=plain.rank,
            alpha=plain.alpha,
            dropout=plain.dropout,
            rslora=plain.rslora,
            rank_pattern=plain.rank_pattern,
            alpha_pattern=plain.alpha_pattern,
        )


class _Kept(NamedTuple):
    """A norm, and everything that it was computed from."""

    A: Tensor
    B: Tensor
    weight: Hashable
    dtype: torch.dtype
    norm: Tensor


class _Decomposed(nn.Module):
    """A (rank, in), B (out, rank) and the magnitude m, (out,) or (1,), over one frozen weight."""

    def __init__(
        self, method: DoRA, weight: FrozenWeight, A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"]
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.m = nn.Parameter(_first_magnitude(method.magnitude, weight))
        self.scale = method.scale
        self.magnitude = method.magnitude
        self.frozen = weight
        self._squares: tuple[Hashable, Tensor] | None = None
        self._kept: _Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what is computed again: a copy stands over a weight of its own."""
        return {**self.__dict__, "_squares": None, "_kept": None}

    def merged(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """m ⊙ V / ‖V‖, or W + m ⊙ ΔW / ‖ΔW‖, in the type of W; the norm is held constant."""
        update = self.scale * self.B @ self.A
        if self.magnitude == "normalised-update":
            norm = torch.linalg.vector_norm(update, dim=1, keepdim=True)
            return weight + (self.m[:, None] / _divisor(norm.detach()) * update).to(weight.dtype)
        V = weight.to(update.dtype) + update
        dim = 1 if self.magnitude == "per-output-row" else (0, 1)
        norm = torch.linalg.vector_norm(V, dim=dim, keepdim=True)
        return (self.m[:, None] / _divisor(norm.detach()) * V).to(weight.dtype)

    def norm(self, weight: FrozenWeight, dtype: torch.dtype) -> Float[Tensor, " magnitudes"]:
        """What m is divided by. W is read in `dtype`; where `kernels` does not take it, its product is of that.

        Between two optimiser steps it stays the same and is computed once. Whether A and B have changed is told by
        their values: PyTorch's fused AdamW, and whatever writes through `.data`, leaves their version counters alone.
        """
        kept, version = self._kept, weight.version
        if kept is None or (kept.weight, kept.dtype) != (version, dtype) or not _same(kept, self.A, self.B):
            with torch.inference_mode(False), torch.no_grad():  # an evaluation's serves the next training step
                if self.magnitude == "scalar-frobenius":
                    norm = _divisor(torch.linalg.vector_norm(self.rows(weight, dtype), dim=0, keepdim=True))
                else:
                    norm = self.rows(weight, dtype, none=1.0)
                kept = self.keep(norm, version, dtype)
        return kept.norm

    def due(self) -> kernels.Updated | None:
        """What `kernels.updated_norms` is told for the next norm; None where it gives none, or none was needed."""
        kept, weight = self._kept, self.frozen
        if kept is None or self.magnitude != "per-output-row" or not weight.stored_in(kept.dtype):
            return None
        return self._told(weight.read(kept.dtype), self._weight_squares(weight))

    def keep(self, norm: Float[Tensor, " magnitudes"], version: Hashable, dtype: torch.dtype) -> _Kept:
        """Takes it for the norm of what A and B are now, over that version of W read in that type."""
        self._kept = _Kept(self.A.clone(), self.B.clone(), version, dtype, norm)
        return self._kept

    @torch.no_grad()
    def rows(self, weight: FrozenWeight, dtype: torch.dtype, none: float = 0.0) -> Float[Tensor, " out"]:
        """The norm of each row of V, or of ΔW where that is normalised, from the thin factors.

        `none` stands for one that is zero.
        """
        A, B, scale, update = self.A, self.B, self.scale, self.magnitude == "normalised-update"
        if not update:
            squares, stored = self._weight_squares(weight), weight.read(dtype)
            if (told := self._told(stored, squares)) is not None:
                return kernels.updated_norms([told], none)[0]
        with torch.autocast(A.device.type, enabled=False):
            sums = scale**2 * _of_rows(A, B)
            if not update:
                U = (stored @ A.to(dtype).T).to(B.dtype)  # (out, rank)
                sums += squares + 2 * scale * (U * B).sum(1)
        norms = sums.clamp_(min=0).sqrt_()
        return torch.where(norms == 0, none, norms)

    def _told(self, stored: Float[Tensor, "out in"], squares: Float[Tensor, " out"]) -> kernels.Updated | None:
        """V as `kernels.updated_norms` takes it; None where it does not."""
        small = len(self.A) <= _SMALL and self.A.dtype == self.B.dtype == squares.dtype == torch.float32
        if not (small and kernels.ready(stored) and stored.is_contiguous()):
            return None
        return kernels.Updated(stored, self.A, self.B, self.scale, squares)

    def _weight_squares(self, weight: FrozenWeight) -> Float[Tensor, " out"]:
        version = weight.version
        if self._squares is None or self._squares[0] != version:
            with torch.inference_mode(False), torch.no_grad():
                self._squares = version, weight.row_norms().square()
        return self._squares[1]


class DoRADelta(_Decomposed):
    """A, B and m over the weight of a linear layer."""

    def __init__(self, site: Site, method: DoRA, weight: FrozenWeight, generator: torch.Generator) -> None:
        A = _uniform(method.rank, site.in_, generator)
        B = torch.zeros(site.out, method.rank)
        if method.magnitude == "normalised-update":
            B = _uniform(site.out, method.rank, generator)
        super().__init__(method, weight, A, B)
        self.dropout = method.dropout

    def forward(
        self, x: Float[Tensor, "tokens in"], weight: FrozenWeight, bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        """m/n ⊙ (x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ) + b; the bias is never scaled."""
        z = dropout(x, self.dropout) if self.training and self.dropout > 0 else None
        if self.magnitude == "per-output-row":
            squares = self._weight_squares(weight)
            y = decomposed(x, z, weight, bias, self.A, self.B, self.scale, self.m, squares)
            if y is not None:
                return y
        n = self.norm(weight, x.dtype)
        if self.magnitude == "normalised-update":
            return low_rank(x, z, weight, bias, self.A, (self.m / n)[:, None] * self.B, self.scale)
        return low_rank(x, z, weight, bias, self.A, self.B, self.scale, self.m, n)


class DoRAEmbedding(_Decomposed):
    """A, B and m over an embedding: m has one entry for each feature, its norm goes over the vocabulary."""

    def __init__(self, site: Site, method: DoRA, weight: FrozenWeight, generator: torch.Generator) -> None:
        A = torch.zeros(method.rank, site.in_)
        if method.magnitude == "normalised-update":
            A = _uniform(method.rank, site.in_, generator)
        super().__init__(method, weight, A, torch.randn(site.out, method.rank, generator=generator))

    def forward(
        self, ids: Int[Tensor, "*shape"], vectors: Float[Tensor, "*shape out"], weight: FrozenWeight
    ) -> Float[Tensor, "*shape out"]:
        """m/n ⊙ (vectors + s·B·A[:, ids])."""
        n = self.norm(weight, vectors.dtype)
        chosen = F.embedding(ids, self.A.T.to(vectors.dtype))  # (…, rank)
        if self.magnitude == "normalised-update":
            return vectors + chosen @ ((self.m / n)[:, None] * self.scale * self.B).T.to(vectors.dtype)
        whole = vectors + chosen @ (self.scale * self.B).T.to(vectors.dtype)
        return (whole * (self.m / n)).to(vectors.dtype)


def _first_magnitude(magnitude: Magnitude, weight: FrozenWeight) -> Float[Tensor, " magnitudes"]:
    if magnitude == "normalised-update":
        return torch.zeros(weight.out)
    rows = weight.row_norms()
    return rows if magnitude == "per-output-row" else torch.linalg.vector_norm(rows, dim=0, keepdim=True)


def _of_rows(A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"]) -> Float[Tensor, " out"]:
    """The square of the norm of each row of B·A."""
    return ((B @ (A @ A.T)) * B).sum(1)


def _divisor(norm: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The norm, and 1 where it is zero: what has no direction is not normalised."""
    return torch.where(norm > 0, norm, 1.0)


def _same(kept: _Kept, A: Tensor, B: Tensor) -> bool:
    """Whether the norm was computed from these values; on an accelerator, where to ask is to wait, not to be known."""
    return A.device.type == "cpu" and kept.A.dtype == A.dtype and torch.equal(kept.A, A) and torch.equal(kept.B, B)


def _uniform(rows: int, columns: int, generator: torch.Generator) -> Float[Tensor, "rows columns"]:
    """Uniform in ±1/√columns, as LoRA's A."""
    bound = 1 / math.sqrt(columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
