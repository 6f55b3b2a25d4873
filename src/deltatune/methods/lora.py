"""LoRA: a frozen weight plus a trained product of two thin matrices.

Hu et al. 2021, arXiv 2106.09685, section 4.1.   W' = W + s·B·A,   s = alpha / rank

    x ──┬────────── W ─────────┬── y
        └── drop ── A ── B·s ──┘

With `rslora` the scale is alpha / √rank (Kalajdzievski 2023, arXiv 2312.03732), which keeps the size of the update
when the rank grows. With `lr_ratio` B learns faster than A (LoRA+, Hayou et al. 2024, arXiv 2402.12354).
What training begins with is in `lora_init.py`; where B₀·A₀ ≠ 0 the delta takes it out again:

    W' = W + s·(B·A − B₀·A₀) = W + s·[B − B₀, B₀]·[A; A − A₀]

The second form has no difference of large products: it loses nothing in 16 bits, and as a plain LoRA of rank 2·rank,
over a base that keeps its bits, it is what a file holds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltatune.dropout import dropout
from deltatune.errors import UserError
from deltatune.methods.contract import CONFIG, Observer, Site, Targets, WeightDelta
from deltatune.methods.lora_init import (
    MOVES,
    Init,
    InputDirections,
    MeanGradient,
    StorageLoss,
    first_factors,
    spread_ranks,
)
from deltatune.methods.low_rank import low_rank
from deltatune.methods.values import at_least_one, positive, rank_fits, refuse_unsupported, share
from deltatune.weights import FrozenWeight


@dataclass(frozen=True)
class LoRA(WeightDelta):
    """Adds a trained low-rank product to frozen weights: W' = W + (alpha / rank)·B·A."""

    rank: int = 8
    """Width of the update: B is (out, rank), A is (rank, in)."""
    alpha: float | None = None
    """Size of the update: it is scaled by alpha / rank. Left out: twice the rank."""
    dropout: float = 0.0
    """Share of the adapter branch's input that is zeroed in training."""
    rslora: bool = False
    """Scale by alpha / √rank instead."""
    init: Init = "kaiming"
    """First A and B: random (kaiming, gaussian, orthogonal), from the weight (pissa, olora), from examples (eva, which
    also deals the ranks anew, lora-ga), or from what storing the weight in fewer bits lost (loftq)."""
    lr_ratio: float = 1.0
    """Learning rate of B as a multiple of A's; LoRA+ (arXiv 2402.12354) recommends about 16."""
    bias: Literal["none", "adapted"] = "none"
    """Which biases train: none, or those of the adapted layers."""
    targets: Targets = "all-linear"
    """Layers to adapt: all-linear, attention, attention-qv, mlp, embeddings, module names or regular expressions."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks for some targets, such as {mlp: 16}."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Other alphas for some targets."""

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    paper: ClassVar[str] = "arXiv 2106.09685"
    learning_rate: ClassVar[float] = 1e-3
    grows_by: ClassVar[str] = "rank"
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "rank", "alpha_pattern": "alpha"}
    embeddings: ClassVar[bool] = True
    peft_type: ClassVar[str] = "LORA"
    suffixes: ClassVar[Mapping[str, str]] = {
        "lora_A.weight": "A",
        "lora_B.weight": "B",
        "lora_embedding_A": "A",
        "lora_embedding_B": "B",
        "base_layer.bias": "bias",
    }
    __pydantic_config__ = CONFIG

    def __post_init__(self) -> None:
        at_least_one("lora", rank=(self.rank, *self.rank_pattern.values()))
        positive("lora", alpha=(self.alpha, *self.alpha_pattern.values()))
        share("lora", dropout=self.dropout)
        positive("lora", lr_ratio=self.lr_ratio)
        for rank in (self.rank, *self.rank_pattern.values()):
            if self.init == "orthogonal" and rank % 2:
                raise UserError(
                    f"lora: init=orthogonal needs an even rank, not {rank}",
                    f"the nearest are {rank - 1 or 2} and {rank + 1}",
                )

    @property
    def scale(self) -> float:
        """s in W' = W + s·B·A."""
        return self._alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def _alpha(self) -> float:
        return float(2 * self.rank if self.alpha is None else self.alpha)

    @property
    def _moves(self) -> bool:
        """Whether it begins with a product that is not zero."""
        return self.init in MOVES

    def _trains_bias(self, site: Site) -> bool:
        return self.bias == "adapted" and site.bias

    def check(self, site: Site) -> None:
        """Raises `UserError` for a rank that B·A could not use, and for an init that is not for the site."""
        rank_fits("lora", self.rank, site)
        if site.embedding and self.init not in ("kaiming", "gaussian"):
            raise UserError(
                f"lora: init={self.init} is not defined over embeddings", "use init=kaiming, or other targets"
            )
        most = min(site.out, site.in_) // 2
        if self._moves and self.rank > most:
            raise UserError(
                f"lora: init={self.init} has an update of rank {2 * self.rank}, twice its rank, and a "
                f"{site.out}×{site.in_} weight no more than {min(site.out, site.in_)}",
                f"the largest rank is {most}",
            )

    def parameters(self, site: Site) -> int:
        """Trained parameters of one site: A, B, and the bias where it trains."""
        return self.rank * (site.out + site.in_) + (site.out if self._trains_bias(site) else 0)

    def stored_parameters(self, sites: Sequence[Site]) -> int:
        """Numbers in a file: those that train, and as many again of A and B where it holds A₀ and B₀ with them."""
        trained = sum(self.parameters(site) for site in sites)
        return trained + (sum(self.rank * (site.out + site.in_) for site in sites) if self._moves else 0)

    def delta(
        self, site: Site, weight: FrozenWeight, shared: nn.Module | None, generator: torch.Generator
    ) -> "LoRADelta | LoRAEmbedding":
        """A fresh pair of matrices that leaves W as it is, see `lora_init`; over an embedding A zero and B normal."""
        if site.embedding:
            return LoRAEmbedding(site, self, generator)
        A, B = first_factors(self.init, self.rank, self.scale, site, weight, generator)
        return LoRADelta(site, self, A, B)

    def observer(self, site: Site) -> Observer | None:
        """What eva sees of the inputs, lora-ga of the gradients, and loftq of what storing the weight lost."""
        if self.init == "eva":
            return InputDirections(self.rank, site)
        if self.init == "loftq":
            return StorageLoss(self.rank, self.scale)
        return MeanGradient() if self.init == "lora-ga" else None

    def informed(self, modules: Mapping[str, WeightDelta], observers: Mapping[str, Observer]) -> "LoRA":
        """EVA: with a rank for each layer, and the alpha that keeps its scale."""
        for path, observer in observers.items():
            if isinstance(observer, MeanGradient) and observer.sum is None:
                raise UserError(f"{path}: no gradient of the examples' loss reaches it", "adapt other targets")
        if self.init != "eva":
            return self
        before = {path: module for path, module in modules.items() if isinstance(module, LoRA)}
        ranks = spread_ranks({path: module.rank for path, module in before.items()}, observers)
        alphas = {
            path: module.scale * (math.sqrt(ranks[path]) if self.rslora else ranks[path])
            for path, module in before.items()
        }
        return replace(self, rank_pattern=ranks, alpha_pattern=alphas)

    @torch.no_grad()
    def begin(self, delta: nn.Module, observer: Observer) -> None:
        """EVA: A from the inputs. LoRA-GA: A and B from the gradient. LoftQ: A and B from what was lost."""
        assert isinstance(delta, LoRADelta)
        if isinstance(observer, StorageLoss) and observer.factors is not None:
            delta.A.copy_(observer.factors[0])
            delta.B.copy_(observer.factors[1])
        if isinstance(observer, InputDirections) and observer.directions is not None:
            delta.A.copy_(observer.directions[: self.rank])
        if isinstance(observer, MeanGradient) and delta.A0 is not None and delta.B0 is not None:
            A, B = observer.factors(self.rank)
            delta.A.copy_(A)
            delta.A0.copy_(A)
            delta.B.copy_(B)
            delta.B0.copy_(B)

    def rates(self) -> Mapping[str, float]:
        """LoRA+: B learns faster than A."""
        return {"B": self.lr_ratio}

    def stored(self, site: Site, delta: nn.Module) -> dict[str, Tensor]:
        """A and B under PEFT's names, as `portable` has them, and the bias where it trains."""
        assert isinstance(delta, LoRADelta | LoRAEmbedding)
        names = ("lora_embedding_A", "lora_embedding_B") if site.embedding else ("lora_A.weight", "lora_B.weight")
        tensors = dict(zip(names, delta.factors(), strict=True))
        return {**tensors, "base_layer.bias": delta.bias} if isinstance(delta.bias, nn.Parameter) else tensors

    def portable(self) -> "LoRA":
        """The same update as a LoRA that needs no examples; of rank 2·rank, at the same scale, where there is A₀."""
        if not self._moves:
            return replace(self, init="kaiming") if self.init in ("eva", "loftq") else self
        factor = math.sqrt(2) if self.rslora else 2.0
        alphas = {key: factor * alpha for key, alpha in self.alpha_pattern.items()}
        if self.rslora and self.alpha is None:  # twice the doubled rank would be too much
            own = {key: factor * 2 * rank for key, rank in self.rank_pattern.items() if key not in alphas}
            alphas = {**own, **alphas}
        return replace(
            self,
            rank=2 * self.rank,
            alpha=factor * self._alpha if self.rslora or self.alpha is not None else None,
            init="kaiming",
            rank_pattern={key: 2 * rank for key, rank in self.rank_pattern.items()},
            alpha_pattern=alphas,
        )

    def to_peft(self, modules: Mapping[str, Any], deltas: Mapping[str, nn.Module]) -> dict[str, Any]:
        """PEFT's LoraConfig fields."""
        return {
            "r": self.rank,
            "lora_alpha": self._alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "rank_pattern": {path: m.rank for path, m in modules.items() if m.rank != self.rank},
            "alpha_pattern": {path: m._alpha for path, m in modules.items() if m._alpha != self._alpha},
            "init_lora_weights": True,
            "bias": "lora_only" if self.bias == "adapted" else "none",
            "use_dora": False,
        }

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Whether it is a plain LoRA adapter; DoRA's have the same type."""
        return config.get("peft_type") == cls.peft_type and not config.get("use_dora")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "LoRA":
        """Reads PEFT's LoraConfig fields; refuses the ones that would change the output and that we do not have."""
        refuse_unsupported("LoRA", config, {"lora_bias": False, "alora_invocation_tokens": None})
        init = config.get("init_lora_weights", True)
        if str(init).startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
            raise UserError(
                f"this LoRA adapter belongs to a base that its init_lora_weights={init!r} had changed",
                "save it in PEFT with path_initial_model_for_weight_conversion, as an adapter of the unchanged base",
            )
        if config.get("bias", "none") not in ("none", "lora_only"):
            raise UserError(
                f"this LoRA adapter has bias={config['bias']!r}, which is not supported", "none and lora_only are"
            )
        return cls(
            rank=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("lora_dropout", 0.0),
            rslora=config.get("use_rslora", False),
            bias="adapted" if config.get("bias") == "lora_only" else "none",
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
        )


class LoRADelta(nn.Module):
    """A (rank, in) and B (out, rank) over one frozen weight, and a bias (out,) where it trains.

    A₀ and B₀ are what A and B began with where their product was not zero.
    """

    A0: Tensor | None
    B0: Tensor | None

    def __init__(self, site: Site, method: LoRA, A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"]) -> None:
        super().__init__()
        self.A = nn.Parameter(A.contiguous())
        self.B = nn.Parameter(B.contiguous())
        self.register_buffer("A0", self.A.detach().clone() if method._moves else None)
        self.register_buffer("B0", self.B.detach().clone() if method._moves else None)
        self.bias = nn.Parameter(torch.zeros(site.out)) if method._trains_bias(site) else None
        self.scale = method.scale
        self.dropout = method.dropout

    def merged(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W + s·B·A, or W + s·(B·A − B₀·A₀), in the type of W."""
        product = self.B @ self.A
        if self.A0 is not None and self.B0 is not None:
            product = product - self.B0 @ self.A0
        return weight + (self.scale * product).to(weight.dtype)

    def factors(self) -> tuple[Float[Tensor, "width in"], Float[Tensor, "out width"]]:
        """A and B of a plain LoRA with the same update: [A; A − A₀] and [B − B₀, B₀] where there are A₀ and B₀."""
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return torch.cat((self.A, self.A - self.A0)), torch.cat((self.B - self.B0, self.B0), 1)

    def forward(
        self, x: Float[Tensor, "tokens in"], weight: FrozenWeight, bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        """The same output from two thin products, the weight left alone."""
        z = dropout(x, self.dropout) if self.training and self.dropout > 0 else None
        return low_rank(x, z, weight, bias, *self.factors(), self.scale)


class LoRAEmbedding(nn.Module):
    """A (rank, vocabulary) and B (width, rank) over one frozen embedding."""

    def __init__(self, site: Site, method: LoRA, generator: torch.Generator) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros(method.rank, site.in_))
        self.B = nn.Parameter(torch.randn(site.out, method.rank, generator=generator))
        self.bias = None
        self.scale = method.scale

    def merged(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W + s·B·A for W (width, vocabulary), in the type of W."""
        return weight + (self.scale * self.B @ self.A).to(weight.dtype)

    def factors(self) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
        """A and B."""
        return self.A, self.B

    def forward(
        self, ids: Int[Tensor, "*shape"], vectors: Float[Tensor, "*shape out"], weight: FrozenWeight
    ) -> Float[Tensor, "*shape out"]:
        """The vectors plus s·B times the columns of A that the ids choose."""
        chosen = F.embedding(ids, self.A.T.to(vectors.dtype))  # (…, rank)
        return vectors + chosen @ (self.scale * self.B).T.to(vectors.dtype)
