"""AdaLoRA: low-rank updates in the form of a singular value decomposition, pruned where they matter least.

Zhang et al. 2023, arXiv 2303.10512, equation 3.   W' = W + s·B·diag(Λ)·A,   s = alpha / (init_r + 10⁻⁵)

    x ──┬─────────────── W ──────────────┬── y      triplet k of a layer: Λ_k, row k of A, column k of B
        └── drop ── A ── ⊙Λ ── B·s ──────┘

The sensitivity of an entry p is |p·∂L/∂p|. It is smoothed to Ī (with beta1), its distance from Ī to Ū (with beta2), and
the entry scores Ī·Ū (equations 8 to 11). A triplet scores that of its Λ plus the means over its row and column (7). At
every `delta_t`-th step the Λ of the lowest triplets of the whole model are set to zero, so that the budget is left:

    triplets
    init_r   ────╮                     the first `tinit` of the steps: nothing is pruned
                  ╲ cubic              then the budget falls as (1 − progress)³ (equation 12)
    target_r       ╰──────────         the last `tfinal`: the same triplets stay out, the others train on

A and B are held near orthonormal rows and columns by a term of the loss, orth_reg_weight·mean(‖A·Aᵀ − I‖, ‖Bᵀ·B − I‖):
Frobenius norms, and their mean over the model, as in the authors' code; equation 4 has their squares. The ranks and
betas are those of the authors' README, and shares like `tinit` and `tfinal` are usual in table 8. orth_reg_weight and
delta_t are PEFT's: the paper has 0.1 for most tasks (0.3 and 0.5 for two), and 1, 10 or 100 steps.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltatune.dropout import dropout
from deltatune.errors import UserError
from deltatune.methods.contract import CONFIG, Site, Targets, WeightDelta
from deltatune.methods.low_rank import low_rank
from deltatune.methods.values import at_least_one, positive, rank_fits, refuse_unsupported, share
from deltatune.weights import FrozenWeight

_STEPS = 1000
"""The length of a run in adapter_config.json, where PEFT wants steps and not shares."""


@dataclass(frozen=True)
class AdaLoRA(WeightDelta):
    """Adds a trained low-rank product to frozen weights and spends its ranks on the layers that need them."""

    init_r: int = 12
    """Triplets of each layer when training starts."""
    target_r: int = 8
    """Triplets of each layer, on average, that are left in the end."""
    alpha: float | None = None
    """Size of the update: it is scaled by alpha / init_r. Left out: twice init_r."""
    dropout: float = 0.0
    """Share of the adapter branch's input that is zeroed in training."""
    tinit: float = 0.1
    """Share of the steps, at first, in which nothing is pruned."""
    tfinal: float = 0.5
    """Share of the steps, at last, in which the remaining triplets train on."""
    delta_t: int = 1
    """Steps from one pruning to the next."""
    beta1: float = 0.85
    """How much of the smoothed sensitivity a step keeps."""
    beta2: float = 0.85
    """How much of the smoothed uncertainty a step keeps."""
    orth_reg_weight: float = 0.5
    """Weight of the term that holds A and B orthonormal."""
    rank: int | None = None
    """Triplets of each layer where it has fewer than init_r, as in an adapter that was pruned; the scale stays."""
    targets: Targets = "all-linear"
    """Layers to adapt: all-linear, attention, attention-qv, mlp, module names or regular expressions."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other values of rank for some targets, such as {mlp: 6}."""

    name: ClassVar[str] = "adalora"
    title: ClassVar[str] = "AdaLoRA"
    paper: ClassVar[str] = "arXiv 2303.10512"
    learning_rate: ClassVar[float] = 2e-2
    grows_by: ClassVar[str] = "init_r"
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "rank"}
    peft_type: ClassVar[str] = "ADALORA"
    suffixes: ClassVar[Mapping[str, str]] = {"lora_A": "A", "lora_B": "B", "lora_E": "Lambda"}
    __pydantic_config__ = CONFIG

    def __post_init__(self) -> None:
        at_least_one("adalora", init_r=self.init_r, target_r=self.target_r, delta_t=self.delta_t)
        if self.target_r > self.init_r:
            raise UserError(
                f"adalora: target_r {self.target_r} is more than init_r {self.init_r}: triplets are only taken away",
                f"target_r can be 1 to {self.init_r}",
            )
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank is not None and not 0 <= rank <= self.init_r:
                raise UserError(f"adalora: rank {rank} is none that pruning leaves", f"it can be 0 to {self.init_r}")
        positive("adalora", alpha=self.alpha)
        share("adalora", dropout=self.dropout, tinit=self.tinit, tfinal=self.tfinal, beta1=self.beta1, beta2=self.beta2)
        if self.tinit + self.tfinal >= 1:
            raise UserError(
                f"adalora: tinit {self.tinit:g} and tfinal {self.tfinal:g} leave no step to prune in",
                "their sum must be below 1",
            )
        if not 0 <= self.orth_reg_weight < torch.inf:
            raise UserError(f"adalora: orth_reg_weight must be a number of at least 0, not {self.orth_reg_weight}")

    @property
    def scale(self) -> float:
        """s in W' = W + s·B·diag(Λ)·A."""
        return self._alpha / (self.init_r + 1e-5)

    @property
    def _alpha(self) -> float:
        return float(2 * self.init_r if self.alpha is None else self.alpha)

    @property
    def _rank(self) -> int:
        return self.init_r if self.rank is None else self.rank

    def check(self, site: Site) -> None:
        """Raises `UserError` for more triplets than min(out, in): their rows could not be orthonormal."""
        rank_fits("adalora", self._rank, site)

    def parameters(self, site: Site) -> int:
        """Trained parameters of one site, before pruning: A, B and Λ."""
        return self._rank * (site.out + site.in_ + 1)

    def delta(
        self, site: Site, weight: FrozenWeight, shared: nn.Module | None, generator: torch.Generator
    ) -> "AdaLoRADelta":
        """Fresh triplets with Λ zero, so that training starts at the base; A and B normal, of deviation 0.02."""
        return AdaLoRADelta(site, self, generator)

    def budget(self, step: int, steps: int, initial: int, target: int) -> int:
        """Triplets of the whole model that may be left after that step, of `initial` ones (equation 12)."""
        first, last = self._phases(steps)
        if step <= first:
            return initial
        progress = min(1.0, (step - first) / (last - first))
        return int((initial - target) * (1 - progress) ** 3 + target)

    def _phases(self, steps: int) -> tuple[int, int]:
        """The step up to which nothing is pruned, and the one after which the same triplets stay out."""
        last = max(1, steps - round(self.tfinal * steps))
        return min(round(self.tinit * steps), last - 1), last

    def penalty(self, deltas: Mapping[str, nn.Module]) -> Float[Tensor, ""] | None:
        """orth_reg_weight times the mean of ‖A·Aᵀ − I‖ and ‖Bᵀ·B − I‖ over all deltas."""
        if not self.orth_reg_weight:
            return None
        alike: dict[torch.Size, list[Tensor]] = {}  # matrices of one shape go through one batched product
        for delta in _triplets(deltas):
            for rows in (delta.A, delta.B.T):
                alike.setdefault(rows.shape, []).append(rows)
        norms = [_from_orthonormal(torch.stack(matrices)) for matrices in alike.values()]
        return self.orth_reg_weight * torch.cat(norms).mean()

    @torch.no_grad()
    def after_step(self, deltas: Mapping[str, nn.Module], step: int, steps: int) -> None:
        """Observes the sensitivities until the last pruning, and prunes; after it the pruned triplets stay out."""
        triplets = _triplets(deltas)
        first, last = self._phases(steps)
        if step < last or last == 1:  # a run of so few steps has nothing else to go by
            for delta in triplets:
                delta.observe(self.beta1, self.beta2)
        if step == last or (first < step < last and step % self.delta_t == 0):
            initial, target = sum(len(delta.Lambda) for delta in triplets), self.target_r * len(triplets)
            self._choose(triplets, self.budget(step, steps, initial, min(initial, target)))
        elif step < last:
            return  # between two prunings a pruned Λ may grow again
        for delta in triplets:
            delta.prune()

    def _choose(self, triplets: list["AdaLoRADelta"], budget: int) -> None:
        """Marks the `budget` triplets of the highest scores in the whole model as the ones that are kept."""
        scores = torch.cat([delta.scores() for delta in triplets])
        kept = torch.ones_like(scores, dtype=torch.bool)
        kept[scores.argsort(stable=True)[: len(scores) - budget]] = False
        for delta, own in zip(triplets, torch.split(kept, [len(delta.Lambda) for delta in triplets]), strict=True):
            delta.kept.copy_(own)

    def settled(self, step: int, steps: int) -> bool:
        """From the last pruning on the model is within its final budget."""
        return step >= self._phases(steps)[1]

    def stored(self, site: Site, delta: nn.Module) -> dict[str, Tensor]:
        """A, B and Λ as a column, as PEFT has them. Pruned triplets have Λ = 0 there."""
        assert isinstance(delta, AdaLoRADelta)
        return {"lora_A": delta.A, "lora_B": delta.B, "lora_E": delta.Lambda[:, None]}

    def restore(self, delta: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Puts A, B and the column Λ into a delta."""
        assert isinstance(delta, AdaLoRADelta)
        delta.A.copy_(tensors["lora_A"])
        delta.B.copy_(tensors["lora_B"])
        delta.Lambda.copy_(tensors["lora_E"][:, 0])

    def to_peft(self, modules: Mapping[str, Any], deltas: Mapping[str, nn.Module]) -> dict[str, Any]:
        """PEFT's AdaLoraConfig fields; its `rank_pattern` tells for each triplet whether the file holds it."""
        final = min(round(self.tfinal * _STEPS), _STEPS - 1)
        initial = min(round(self.tinit * _STEPS), _STEPS - 1 - final)  # PEFT, too, wants a step to prune in
        fewer = {path: m._rank for path, m in modules.items() if m._rank != self.init_r}
        return {
            "init_r": self.init_r,
            "target_r": self.target_r,
            "lora_alpha": self._alpha,
            "lora_dropout": self.dropout,
            "tinit": initial,
            "tfinal": final,
            "total_step": _STEPS,
            "deltaT": self.delta_t,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "orth_reg_weight": self.orth_reg_weight,
            "rank_pattern": {
                f"{path}.lora_E": [k < rank for k in range(self.init_r)] for path, rank in fewer.items()
            } or None,
            "bias": "none",
        }  # fmt: skip

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "AdaLoRA":
        """Reads PEFT's AdaLoraConfig fields; refuses trained biases. Steps become shares of the run's."""
        refuse_unsupported("AdaLoRA", config, {"bias": "none"})
        steps = config.get("total_step") or _STEPS
        left = config.get("rank_pattern") or {}
        return cls(
            init_r=config.get("init_r", 12),
            target_r=config.get("target_r", 8),
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("lora_dropout", 0.0),
            tinit=config.get("tinit", 0) / steps,
            tfinal=config.get("tfinal", 0) / steps,
            delta_t=config.get("deltaT", 1),
            beta1=config.get("beta1", 0.85),
            beta2=config.get("beta2", 0.85),
            orth_reg_weight=config.get("orth_reg_weight", 0.5),
            rank_pattern={re.escape(key.partition(".lora_E")[0]): sum(kept) for key, kept in left.items()},
        )


class AdaLoRADelta(nn.Module):
    """Triplets over one frozen weight: A (rank, in), Λ (rank) and B (out, rank), and what is known of their worth."""

    kept: Tensor

    def __init__(self, site: Site, method: AdaLoRA, generator: torch.Generator) -> None:
        super().__init__()
        rank = method._rank
        self.A = nn.Parameter(torch.empty(rank, site.in_).normal_(0, 0.02, generator=generator))
        self.B = nn.Parameter(torch.empty(site.out, rank).normal_(0, 0.02, generator=generator))
        self.Lambda = nn.Parameter(torch.zeros(rank))
        self.scale = method.scale
        self.dropout = method.dropout
        for name, parameter in list(self.named_parameters()):
            self.register_buffer(f"sensitivity_{name}", torch.zeros_like(parameter.detach()), persistent=False)
            self.register_buffer(f"uncertainty_{name}", torch.zeros_like(parameter.detach()), persistent=False)
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool), persistent=False)

    def merged(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W + s·B·diag(Λ)·A, in the type of W."""
        return weight + (self.scale * self.B @ (self.Lambda[:, None] * self.A)).to(weight.dtype)

    def forward(
        self, x: Float[Tensor, "tokens in"], weight: FrozenWeight, bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        """The same output from two thin products, the weight left alone."""
        z = dropout(x, self.dropout) if self.training and self.dropout > 0 else None
        return low_rank(x, z, weight, bias, self.Lambda[:, None] * self.A, self.B, self.scale)

    def observe(self, beta1: float, beta2: float) -> None:
        """Takes the sensitivities |p·∂L/∂p| of this step into the smoothed ones."""
        for name, parameter in self.named_parameters():
            sensitivity, uncertainty = self._known(name)
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            now = (parameter * gradient).abs_()
            sensitivity.lerp_(now, 1 - beta1)
            uncertainty.lerp_(now.sub_(sensitivity).abs_(), 1 - beta2)

    def scores(self) -> Float[Tensor, " rank"]:
        """How much each triplet matters."""
        A, B, Lambda = (torch.mul(*self._known(name)) for name in ("A", "B", "Lambda"))
        return Lambda + A.mean(1) + B.mean(0)

    def prune(self) -> None:
        """Sets Λ to zero where a triplet is not kept."""
        self.Lambda.masked_fill_(~self.kept, 0.0)

    def _known(self, name: str) -> tuple[Tensor, Tensor]:
        return self.get_buffer(f"sensitivity_{name}"), self.get_buffer(f"uncertainty_{name}")


def _triplets(deltas: Mapping[str, nn.Module]) -> list[AdaLoRADelta]:
    return [delta for delta in deltas.values() if isinstance(delta, AdaLoRADelta)]


def _from_orthonormal(rows: Float[Tensor, "matrices rank width"]) -> Float[Tensor, " matrices"]:
    """‖M·Mᵀ − I‖ of each matrix M."""
    eye = torch.eye(rows.shape[1], device=rows.device, dtype=rows.dtype)
    norms: Tensor = torch.linalg.matrix_norm(rows @ rows.mT - eye)
    return norms
