"""VB-LoRA: low-rank matrices put together from a bank of vectors that the whole model shares.

Li et al. 2024, arXiv 2405.15179, section 3.   W' = W + B·A, made in pieces of b numbers, each

    piece = Σ_k softmax(logits_k)·bank_k      over the k largest of its h logits; bank is (h, b)

    A (rank, in):  ┌ piece │ piece │ … ┐ a row = in/b pieces       B (out, rank): a column = out/b pieces
                   └ piece │ piece │ … ┘

Of the logits a file needs only which k vectors each piece mixes and by how much: `save_only_topk` saves no more.
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
from deltatune.methods.low_rank import low_rank
from deltatune.methods.values import at_least_one, divides_both, rank_fits, refuse_unsupported, share
from deltatune.weights import FrozenWeight

_BANK_BOUND, _LOGITS_STD = 0.02, 0.1
"""The bank starts uniform in ± the one, the logits normal with the other."""

_LOGITS = ("logits_A", "logits_B")

_NEVER_CHOSEN = -1e4
"""The logit of a vector that a compact file did not name: out of training's reach, yet a number that can be saved."""


@dataclass(frozen=True)
class VBLoRA(WeightDelta):
    """Adds a low-rank product whose pieces mix a few vectors of one bank that all layers share."""

    rank: int = 4
    """Width of the update: B is (out, rank), A is (rank, in)."""
    num_vectors: int = 256
    """Vectors in the bank."""
    vector_length: int = 256
    """Numbers in a vector; it must divide both sides of every adapted weight."""
    topk: int = 2
    """Vectors that a piece mixes: those with the largest logits."""
    save_only_topk: bool = False
    """Save of the logits only which vectors a piece mixes and by how much; trained further, that choice then stays."""
    dropout: float = 0.0
    """Share of the adapter branch's input that is zeroed in training."""
    targets: Targets = "all-linear"
    """Layers to adapt: all-linear, attention, attention-qv, mlp, module names or regular expressions."""

    name: ClassVar[str] = "vblora"
    title: ClassVar[str] = "VB-LoRA"
    paper: ClassVar[str] = "arXiv 2405.15179"
    learning_rate: ClassVar[float] = 6e-2
    grows_by: ClassVar[str] = "num_vectors"
    peft_type: ClassVar[str] = "VBLORA"
    suffixes: ClassVar[Mapping[str, str]] = {
        "vblora_logits_A": "logits_A",
        "vblora_logits_B": "logits_B",
        "vblora_logits_A_topk_indices": "logits_A",
        "vblora_logits_A_topk_weights": "logits_A",
        "vblora_logits_B_topk_indices": "logits_B",
        "vblora_logits_B_topk_weights": "logits_B",
    }
    shared_suffixes: ClassVar[Mapping[str, str]] = {"vblora_vector_bank": "vectors"}
    __pydantic_config__ = CONFIG

    def __post_init__(self) -> None:
        at_least_one("vblora", rank=self.rank, vector_length=self.vector_length, topk=self.topk)
        share("vblora", dropout=self.dropout)
        if self.num_vectors < self.topk:
            raise UserError(
                f"vblora: topk {self.topk} is more than the {self.num_vectors} vectors of the bank",
                f"give num_vectors of at least {self.topk}, or a lower topk",
            )

    def _pieces(self, site: Site) -> int:
        return self.rank * (site.out + site.in_) // self.vector_length

    def check(self, site: Site) -> None:
        """Raises `UserError` for vectors that do not fill A's rows and B's columns, and for too high a rank."""
        rank_fits("vblora", self.rank, site)
        divides_both("vblora", site, vector_length=self.vector_length)

    def parameters(self, site: Site) -> int:
        """Trained parameters of one site: a logit for each piece and each vector of the bank."""
        return self._pieces(site) * self.num_vectors

    def shared_parameters(self, sites: Sequence[Site]) -> int:
        """Trained parameters that all sites share: the bank."""
        return self.num_vectors * self.vector_length

    def stored_parameters(self, sites: Sequence[Site]) -> int:
        """Numbers in a file: the bank and all logits, or topk indices and topk − 1 weights for each piece."""
        per_piece = 2 * self.topk - 1 if self.save_only_topk else self.num_vectors
        return self.shared_parameters(sites) + per_piece * sum(map(self._pieces, sites))

    def start_distance(self, site: Site) -> float:
        """B·A at the start, each piece a mean of topk vectors: a sum of `rank` products of two such small numbers."""
        return math.sqrt(self.rank) * _BANK_BOUND**2 / 3 / self.topk

    def share(self, sites: Sequence[Site], generator: torch.Generator) -> "VectorBank":
        """The bank, uniform in ±0.02: zeros would get no gradient."""
        return VectorBank(self, generator)

    def delta(
        self, site: Site, weight: FrozenWeight, shared: nn.Module | None, generator: torch.Generator
    ) -> "VBLoRADelta":
        """Fresh logits, normal with standard deviation 0.1: choices differ, the update is nearly zero."""
        assert isinstance(shared, VectorBank)
        return VBLoRADelta(site, self, shared, generator)

    def rates(self) -> Mapping[str, float]:
        """The bank learns at a tenth of the logits' rate, as in the paper."""
        return {"bank.vectors": 0.1}

    @property
    def lossless(self) -> bool:
        """All logits load to their bits; from the compact form they are logarithms of weights."""
        return not self.save_only_topk

    def stored(self, site: Site, delta: nn.Module) -> dict[str, Tensor]:
        """All logits; or, with `save_only_topk`, the indices of each piece and its weights but for the last."""
        if not self.save_only_topk:
            return {f"vblora_{name}": getattr(delta, name) for name in _LOGITS}
        tensors: dict[str, Tensor] = {}
        for name in _LOGITS:
            highest, chosen = getattr(delta, name).detach().topk(self.topk)
            weights = highest.softmax(-1)[..., :-1].contiguous()
            # The last one is what they leave of 1. PEFT takes its logarithm, so that must not fall below 0.
            weights[..., :1] -= 2 * (weights.sum(-1, keepdim=True) - 1).clamp_min(0)
            tensors[f"vblora_{name}_topk_indices"] = chosen.to(self._index_type)
            tensors[f"vblora_{name}_topk_weights"] = weights
        return tensors

    @property
    def _index_type(self) -> torch.dtype:
        """PEFT's choice, which is a size above the smallest at 256 vectors."""
        if self.num_vectors < 2**8:
            return torch.uint8
        return torch.int16 if self.num_vectors < 2**15 else torch.int32

    def restore(self, delta: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Puts the logits back; from the compact form such ones as give the saved weights.

        After that the bank and the weights can be trained further, while each piece keeps the vectors that it mixes.
        """
        if not self.save_only_topk:
            super().restore(delta, tensors)
            return
        for name in _LOGITS:
            logits: Tensor = getattr(delta, name)
            chosen = tensors[f"vblora_{name}_topk_indices"].long()
            if chosen.min() < 0 or chosen.max() >= self.num_vectors:
                raise UserError(f"the adapter is damaged: a {name} index goes beyond its bank of {self.num_vectors}")
            weights = tensors[f"vblora_{name}_topk_weights"].to(logits.dtype)
            weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
            weights.clamp_min_(torch.finfo(weights.dtype).tiny)  # the last may be 0, or below by rounding
            logits.fill_(_NEVER_CHOSEN).scatter_(-1, chosen, weights.log())

    def to_peft(self, modules: Mapping[str, Any], deltas: Mapping[str, nn.Module]) -> dict[str, Any]:
        """PEFT's VBLoRAConfig fields."""
        return {
            "r": self.rank,
            "num_vectors": self.num_vectors,
            "vector_length": self.vector_length,
            "topk": self.topk,
            "save_only_topk_weights": self.save_only_topk,
            "vblora_dropout": self.dropout,
            "init_vector_bank_bound": _BANK_BOUND,
            "init_logits_std": _LOGITS_STD,
            "bias": "none",
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "VBLoRA":
        """Reads PEFT's VBLoRAConfig fields; refuses trained biases, which we do not have here."""
        refuse_unsupported("VB-LoRA", config, {"bias": "none"})
        return cls(
            rank=config.get("r", 4),
            num_vectors=config.get("num_vectors", 256),
            vector_length=config.get("vector_length", 256),
            topk=config.get("topk", 2),
            save_only_topk=config.get("save_only_topk_weights", False),
            dropout=config.get("vblora_dropout", 0.0),
        )


class VectorBank(nn.Module):
    """The vectors (num_vectors, vector_length) that the pieces of all layers mix."""

    def __init__(self, method: VBLoRA, generator: torch.Generator) -> None:
        super().__init__()
        vectors = torch.empty(method.num_vectors, method.vector_length)
        self.vectors = nn.Parameter(vectors.uniform_(-_BANK_BOUND, _BANK_BOUND, generator=generator))


class VBLoRADelta(nn.Module):
    """Logits of A's pieces (rank, in/b, h) and of B's (out/b, rank, h) over one frozen weight, and the shared bank."""

    def __init__(self, site: Site, method: VBLoRA, bank: VectorBank, generator: torch.Generator) -> None:
        super().__init__()
        b, h = method.vector_length, method.num_vectors
        self.logits_A = nn.Parameter(torch.randn(method.rank, site.in_ // b, h, generator=generator) * _LOGITS_STD)
        self.logits_B = nn.Parameter(torch.randn(site.out // b, method.rank, h, generator=generator) * _LOGITS_STD)
        self.bank = bank
        self.topk = method.topk
        self.dropout = method.dropout

    def merged(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W + B·A, in the type of W."""

        def mixes(logits: Tensor) -> Tensor:
            highest, chosen = logits.topk(self.topk)
            return (highest.softmax(-1).unsqueeze(-1) * self.bank.vectors[chosen]).sum(-2)

        A = mixes(self.logits_A).flatten(1)  # (rank, in/b, b) → (rank, in)
        B = mixes(self.logits_B).transpose(1, 2).flatten(0, 1)  # (out/b, rank, b) → (out/b, b, rank) → (out, rank)
        return weight + (B @ A).to(weight.dtype)

    def forward(
        self, x: Float[Tensor, "tokens in"], weight: FrozenWeight, bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        """The same output from two thin products, the weight left alone."""
        A = self._mixes(self.logits_A).flatten(1)
        B = self._mixes(self.logits_B).transpose(1, 2).flatten(0, 1)
        z = dropout(x, self.dropout) if self.training and self.dropout > 0 else None
        return low_rank(x, z, weight, bias, A, B, 1.0)

    def _mixes(self, logits: Float[Tensor, "m n h"]) -> Float[Tensor, "m n b"]:
        mixes: Tensor = _Mix.apply(logits.flatten(0, 1), self.bank.vectors, self.topk)  # type: ignore[no-untyped-call]
        return mixes.view(*logits.shape[:2], -1)


class _Mix(torch.autograd.Function):
    """piece = Σ_k w_k·v_k for each row of logits: w the softmax of its k largest, v the vectors that they choose.

    Backward, with d the piece's gradient:   dv_k = w_k·d,  dw_k = d·v_k,  dlogit_k = w_k·(dw_k − Σ w·dw).
    Kept are the weights and the indices, not the chosen vectors.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, bank: Tensor, topk: int) -> Tensor:
        highest, chosen = logits.topk(topk)  # (pieces, k)
        weights = highest.softmax(-1)
        ctx.save_for_backward(bank, weights, chosen)
        ctx.shape = logits.shape
        return F.embedding_bag(chosen, bank, per_sample_weights=weights, mode="sum")  # (pieces, b)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        bank, weights, chosen = ctx.saved_tensors
        dweights = (bank[chosen] * d.unsqueeze(1)).sum(2)  # no matrix product: autocast would round it
        dhighest = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
        dlogits = d.new_zeros(ctx.shape).scatter_(1, chosen, dhighest)
        dchosen = weights.unsqueeze(2) * d.unsqueeze(1)  # (pieces, k, b)
        dbank = torch.zeros_like(bank).index_add_(0, chosen.flatten(), dchosen.flatten(0, 1))
        return dlogits, dbank, None
