"""FourierFT: a frozen weight plus the inverse Fourier transform of a sparse spectrum.

Gao et al. 2024, arXiv 2405.03003, equations 2 to 4.   W' = W + λ·Re(ifft2(S)),   S has n trained coefficients, zero
elsewhere, at places that are drawn from a seed and never stored.

S is real, so what is left of the transform is a sum of cosines, C(S) / (out·in):

    C(S)[j, k] = Σ S[u, v]·cos 2π(u·j / out + v·k / in)

C is its own adjoint: the gradient of S is C of the gradient of ΔW. And C(S)[−j, −k] = C(S)[j, k], so that a transform
of real numbers, which makes half of the columns, is enough.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltatune.methods.contract import CONFIG, Site, Targets, WeightDelta
from deltatune.methods.entries import count_fits, random_places
from deltatune.methods.through import through_update
from deltatune.methods.values import at_least_one, positive, refuse_unsupported
from deltatune.weights import FrozenWeight


@dataclass(frozen=True)
class FourierFT(WeightDelta):
    """Trains a few Fourier coefficients of the update: W' = W + scaling·Re(ifft2(S))."""

    coefficients: int = 1000
    """Trained coefficients of each layer, at random places of its spectrum."""
    scaling: float = 150.0
    """Size of the update: the transform is multiplied by it."""
    init: Literal["normal", "zeros"] = "normal"
    """Coefficients before training: normal, as in the paper, so that the start is not the base; or zeros."""
    location_seed: int = 777
    """Decides the places of the coefficients; layers of one shape have the same ones."""
    targets: Targets = "all-linear"
    """Layers to adapt: all-linear, attention, attention-qv, mlp, module names or regular expressions."""
    coefficients_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other numbers of coefficients for some targets, such as {mlp: 2000}."""

    name: ClassVar[str] = "fourierft"
    title: ClassVar[str] = "FourierFT"
    paper: ClassVar[str] = "arXiv 2405.03003"
    learning_rate: ClassVar[float] = 1e-1
    grows_by: ClassVar[str] = "coefficients"
    patterns: ClassVar[Mapping[str, str]] = {"coefficients_pattern": "coefficients"}
    peft_type: ClassVar[str] = "FOURIERFT"
    suffixes: ClassVar[Mapping[str, str]] = {"fourierft_spectrum": "spectrum"}
    __pydantic_config__ = CONFIG

    def __post_init__(self) -> None:
        at_least_one("fourierft", coefficients=(self.coefficients, *self.coefficients_pattern.values()))
        positive("fourierft", scaling=self.scaling)

    def check(self, site: Site) -> None:
        """Raises `UserError` for more coefficients than the weight has entries."""
        count_fits("fourierft", self.coefficients, site)

    def parameters(self, site: Site) -> int:
        """Trained parameters of one site: its coefficients."""
        return self.coefficients

    def start_distance(self, site: Site) -> float:
        """Each entry is scaling / (out·in) times a sum of cosines, of mean square 1/2, with normal factors."""
        if self.init == "zeros":
            return 0.0
        return self.scaling * math.sqrt(self.coefficients / 2) / (site.out * site.in_)

    def delta(
        self, site: Site, weight: FrozenWeight, shared: nn.Module | None, generator: torch.Generator
    ) -> "FourierFTDelta":
        """Coefficients that are normal, or zero."""
        return FourierFTDelta(site, self, generator)

    def to_peft(self, modules: Mapping[str, Any], deltas: Mapping[str, nn.Module]) -> dict[str, Any]:
        """PEFT's FourierFTConfig fields."""
        return {
            "n_frequency": self.coefficients,
            "n_frequency_pattern": {
                path: m.coefficients for path, m in modules.items() if m.coefficients != self.coefficients
            },
            "scaling": self.scaling,
            "random_loc_seed": self.location_seed,
            "init_weights": self.init == "zeros",
            "bias": "none",
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "FourierFT":
        """Reads PEFT's FourierFTConfig fields; refuses trained biases, which we do not have here."""
        refuse_unsupported("FourierFT", config, {"bias": "none"})
        return cls(
            coefficients=config.get("n_frequency", 1000),
            scaling=config.get("scaling", 150.0),
            init="zeros" if config.get("init_weights") else "normal",
            location_seed=config.get("random_loc_seed", 777),
            coefficients_pattern=config.get("n_frequency_pattern") or {},
        )


class FourierFTDelta(nn.Module):
    """The trained `spectrum`: n coefficients over one frozen weight."""

    places: Int[Tensor, " n"]

    def __init__(self, site: Site, method: FourierFT, generator: torch.Generator) -> None:
        super().__init__()
        start = torch.zeros(method.coefficients)
        self.spectrum = nn.Parameter(start.normal_(generator=generator) if method.init == "normal" else start)
        self.scaling = method.scaling
        self.out, self.in_ = site.out, site.in_
        places = random_places(site.out * site.in_, method.coefficients, method.location_seed)
        self.register_buffer("places", places, persistent=False)

    def update(self, spectrum: Float[Tensor, " n"]) -> Float[Tensor, "out in"]:
        """ΔW, whole."""
        scaled = spectrum * (self.scaling / (self.out * self.in_))
        made: Tensor = _Cosines.apply(scaled, self.places, self.out, self.in_)  # type: ignore[no-untyped-call]
        return made

    def merged(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W + λ·Re(ifft2(S)), in the type of W."""
        S = self.spectrum.new_zeros(self.out * self.in_).index_copy(0, self.places, self.spectrum)
        update: Tensor = self.scaling * torch.fft.ifft2(S.view(self.out, self.in_)).real
        return weight + update.to(weight.dtype)

    def forward(
        self, x: Float[Tensor, "tokens in"], weight: FrozenWeight, bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        """The same output; ΔW is made again for backward."""
        return through_update(x, weight, bias, self.update, self.spectrum)


class _Cosines(torch.autograd.Function):
    """C(S) from the coefficients and their places in S.   Backward:   C of the gradient, at those places."""

    @staticmethod
    def forward(ctx: Any, spectrum: Tensor, places: Tensor, out: int, in_: int) -> Tensor:
        ctx.places = places
        S = spectrum.new_zeros(out * in_).index_copy_(0, places, spectrum)
        whole: Tensor = _cosines(S.view(out, in_))
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found: Tensor = _cosines(gradient).take(ctx.places)
        return found, None, None, None


def _cosines(S: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    in_ = S.shape[1]
    half = torch.fft.rfft2(S).real  # columns 0 … in/2
    first = half.shape[1]
    whole = torch.empty_like(S)
    whole[:, :first] = half
    # Column k is column in − k with the rows −j, of which row 0 is itself.
    mirror = half[:, 1 : in_ - first + 1]
    whole[0, first:] = mirror[0].flip(0)
    whole[1:, first:] = mirror[1:].flip(0, 1)
    return whole
