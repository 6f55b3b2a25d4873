"""WaveFT: a frozen weight plus the inverse wavelet transform of a sparse spectrum.

Bilican et al. 2025, arXiv 2505.12532, section 3.   W' = W + λ·IDWT(S),   S has p trained coefficients, zero elsewhere

    S = ┌────┬────┐     filters of the rows × of the columns:
        │ cA │ cH │     cA  low × low     cH  high × low
        ├────┼────┤     cV  low × high    cD  high × high
        │ cV │ cD │
        └────┴────┘

The p places are drawn from a seed and never stored. A coefficient c of a family with filters of length f adds λ·c times
the outer product of its two filters to one f×f patch of ΔW, so no transform of the whole of S is needed. Haar's patches
(db1, f = 2) are 2×2 blocks that tile ΔW, with the closed form

    ½·┌ a+h+v+d  a+h−v−d ┐
      └ a−h+v−d  a−h−v+d ┘
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltatune.errors import UserError, nearest
from deltatune.methods.contract import CONFIG, Site, Targets, WeightDelta
from deltatune.methods.entries import count_fits, random_places, with_entries
from deltatune.methods.through import through_entries, through_update
from deltatune.methods.values import at_least_one, positive, refuse_unsupported
from deltatune.weights import FrozenWeight

_WRONG_IN_PEFT = ("coif4", "coif5")
"""Wavelets of which the table in PEFT 0.21 has other numbers than PyWavelets; all others that it has agree."""


@dataclass(frozen=True)
class WaveFT(WeightDelta):
    """Trains a few wavelet coefficients of the update: W' = W + scaling·IDWT(S)."""

    coefficients: int = 2592
    """Trained coefficients of each layer, at random places of its spectrum."""
    scaling: float = 25.0
    """Size of the update: the transform is multiplied by it."""
    wavelet: str = "db1"
    """Family and order: db1 (Haar) to db38, sym2 to sym20, coif1 to coif17. Haar is by far the fastest."""
    idwt: bool = True
    """Whether there is a transform; without it the coefficients are entries of the update themselves."""
    location_seed: int = 777
    """Decides the places of the coefficients; layers of one shape have the same ones."""
    targets: Targets = "all-linear"
    """Layers to adapt: all-linear, attention, attention-qv, mlp, module names or regular expressions."""
    coefficients_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other numbers of coefficients for some targets, such as {mlp: 5000}."""

    name: ClassVar[str] = "waveft"
    title: ClassVar[str] = "WaveFT"
    paper: ClassVar[str] = "arXiv 2505.12532"
    learning_rate: ClassVar[float] = 1e-3
    grows_by: ClassVar[str] = "coefficients"
    patterns: ClassVar[Mapping[str, str]] = {"coefficients_pattern": "coefficients"}
    peft_type: ClassVar[str] = "WAVEFT"
    suffixes: ClassVar[Mapping[str, str]] = {"waveft_spectrum": "spectrum"}
    __pydantic_config__ = CONFIG

    def __post_init__(self) -> None:
        at_least_one("waveft", coefficients=(self.coefficients, *self.coefficients_pattern.values()))
        positive("waveft", scaling=self.scaling)
        if self.wavelet not in _wavelets():
            close = ", ".join(nearest(self.wavelet, _wavelets()))
            raise UserError(
                f"waveft: there is no wavelet named '{self.wavelet}'",
                f"the nearest: {close}; there are db1 (Haar) to db38, sym2 to sym20 and coif1 to coif17",
            )

    def check(self, site: Site) -> None:
        """Raises `UserError` for more coefficients than the weight has entries."""
        count_fits("waveft", self.coefficients, site)

    def parameters(self, site: Site) -> int:
        """Trained parameters of one site: its coefficients."""
        return self.coefficients

    def delta(
        self, site: Site, weight: FrozenWeight, shared: nn.Module | None, generator: torch.Generator
    ) -> "WaveFTDelta | UntransformedDelta":
        """Coefficients that are all zero, so that training starts at the base."""
        if not self.idwt:
            return UntransformedDelta(site, self)
        return HaarDelta(site, self) if self.wavelet == "db1" else WaveFTDelta(site, self)

    def to_peft(self, modules: Mapping[str, Any], deltas: Mapping[str, nn.Module]) -> dict[str, Any]:
        """PEFT's WaveFTConfig fields."""
        return {
            "n_frequency": self.coefficients,
            "n_frequency_pattern": {
                path: m.coefficients for path, m in modules.items() if m.coefficients != self.coefficients
            },
            "scaling": self.scaling,
            "wavelet_family": self.wavelet,
            "use_idwt": self.idwt,
            "random_loc_seed": self.location_seed,
            "init_weights": True,
            "proportional_parameters": False,
            "bias": "none",
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "WaveFT":
        """Reads PEFT's WaveFTConfig fields; refuses the ones that would change the output and that we do not have."""
        refuse_unsupported("WaveFT", config, {"bias": "none", "proportional_parameters": False})
        if config.get("wavelet_family") in _WRONG_IN_PEFT:
            raise UserError(
                f"this WaveFT adapter was made with PEFT's filters of {config['wavelet_family']}, which are wrong",
                "train it again with another wavelet",
            )
        return cls(
            coefficients=config.get("n_frequency", 2592),
            scaling=config.get("scaling", 25.0),
            wavelet=config.get("wavelet_family", "db1"),
            idwt=config.get("use_idwt", True),
            location_seed=config.get("random_loc_seed", 777),
            coefficients_pattern=config.get("n_frequency_pattern") or {},
        )


class WaveFTDelta(nn.Module):
    """The trained `spectrum`, p coefficients over one frozen weight, with any wavelet."""

    bands: Int[Tensor, "2 p"]
    corners: Int[Tensor, " p"]

    def __init__(self, site: Site, method: WaveFT) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(torch.zeros(method.coefficients))
        self.scaling, self.wavelet = method.scaling, method.wavelet
        self.out, self.in_ = site.out, site.in_
        length = len(_filters(method.wavelet)[0])
        bands, corners = _patches(site.out, site.in_, method.coefficients, method.location_seed, length)
        self.register_buffer("bands", bands, persistent=False)
        self.register_buffer("corners", corners, persistent=False)

    def update(self, spectrum: Float[Tensor, " p"]) -> Float[Tensor, "out in"]:
        """ΔW: the sum of every coefficient's patch, trimmed to the size of W."""
        filters = torch.tensor(_filters(self.wavelet), dtype=spectrum.dtype, device=spectrum.device)  # low, high
        rows, columns = filters[self.bands]  # (p, f) each
        patches = (self.scaling * spectrum)[:, None, None] * rows[:, :, None] * columns[:, None, :]
        length = filters.shape[1]
        height, width = _untrimmed(self.out, length), _untrimmed(self.in_, length)
        steps = torch.arange(length, device=spectrum.device)
        places = self.corners[:, None, None] + steps[:, None] * width + steps
        whole = spectrum.new_zeros(height * width).index_add(0, places.flatten(), patches.flatten())
        margin = length - 2
        return whole.view(height, width)[margin : margin + self.out, margin : margin + self.in_]

    def merged(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W + ΔW, in the type of W."""
        return weight + self.update(self.spectrum).to(weight.dtype)

    def forward(
        self, x: Float[Tensor, "tokens in"], weight: FrozenWeight, bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        """The same output; ΔW is made again for backward."""
        return through_update(x, weight, bias, self.update, self.spectrum)


class HaarDelta(WaveFTDelta):
    """Haar's blocks: each entry of ΔW that is not zero is made once, from the coefficients of its own block."""

    slots: Int[Tensor, " p"]
    places: Int[Tensor, " entries"]
    inside: Int[Tensor, " entries"] | None

    def __init__(self, site: Site, method: WaveFT) -> None:
        super().__init__(site, method)
        self.blocks, slots, places, inside = _blocks(site.out, site.in_, method.coefficients, method.location_seed)
        self.register_buffer("slots", slots, persistent=False)
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("inside", inside, persistent=False)

    def values(self, spectrum: Float[Tensor, " p"]) -> Float[Tensor, " entries"]:
        """The entries of ΔW that are not zero, in the order of `places`."""
        a, h, v, d = spectrum.new_zeros(4 * self.blocks).index_copy(0, self.slots, spectrum).view(4, self.blocks)
        entries = torch.cat([a + h + v + d, a + h - v - d, a - h + v - d, a - h - v + d]) * (self.scaling / 2)
        return entries if self.inside is None else entries[self.inside]

    def forward(
        self, x: Float[Tensor, "tokens in"], weight: FrozenWeight, bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        """The same output from a weight that is changed at those entries alone."""
        return through_entries(x, weight, bias, self.places, self.values, self.spectrum)


class UntransformedDelta(nn.Module):
    """The trained `spectrum` as entries of ΔW: what the paper compares its transform with, and calls SHiRA."""

    places: Int[Tensor, " p"]

    def __init__(self, site: Site, method: WaveFT) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(torch.zeros(method.coefficients))
        self.scaling = method.scaling
        places = random_places(site.out * site.in_, method.coefficients, method.location_seed)
        self.register_buffer("places", places, persistent=False)

    def values(self, spectrum: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """The entries of ΔW at `places`."""
        return self.scaling * spectrum

    def merged(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W + ΔW, in the type of W."""
        return with_entries(weight, self.places, self.values(self.spectrum))

    def forward(
        self, x: Float[Tensor, "tokens in"], weight: FrozenWeight, bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        """The same output from a weight that is changed at those entries alone."""
        return through_entries(x, weight, bias, self.places, self.values, self.spectrum)


@lru_cache
def _wavelets() -> tuple[str, ...]:
    import pywt  # here, so that who uses other methods does not wait for it

    return tuple(name for family in ("db", "sym", "coif") for name in pywt.wavelist(family))


@lru_cache
def _filters(wavelet: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The low-pass and the high-pass filter of the inverse transform."""
    import pywt

    filters = pywt.Wavelet(wavelet)
    return tuple(filters.rec_lo), tuple(filters.rec_hi)


def _half(side: int, length: int) -> int:
    """Coefficients of one band along a side of W: PEFT pads the spectrum by length − 2, then to an even number."""
    return (side + length - 1) // 2


def _untrimmed(side: int, length: int) -> int:
    """What the inverse transform makes of them, length − 2 at both ends included."""
    return 2 * _half(side, length) + length - 2


def _along(places: Int[Tensor, " p"], side: int, length: int) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
    """Along one side: the half of the padded spectrum that each place is in, and where its patch begins, untrimmed.

    The drawn places are in the middle of the padded spectrum.
    """
    half = _half(side, length)
    padded = places + (2 * half - side) // 2
    return padded // half, 2 * (padded % half)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _patches(
    out: int, in_: int, count: int, seed: int, length: int
) -> tuple[Int[Tensor, "2 count"], Int[Tensor, " count"]]:
    """Of each coefficient the filters of its rows and columns (0 low, 1 high) and the first place of its patch."""
    drawn = random_places(out * in_, count, seed)
    bottom, row = _along(drawn // in_, out, length)
    right, column = _along(drawn % in_, in_, length)
    return torch.stack([right, bottom]), row * _untrimmed(in_, length) + column


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _blocks(
    out: int, in_: int, count: int, seed: int
) -> tuple[int, Int[Tensor, " count"], Int[Tensor, " entries"], Int[Tensor, " entries"] | None]:
    """Haar's blocks that have a coefficient.

    How many; where each coefficient stands among their (a, h, v, d); the places of their entries in ΔW; and, where a
    side is odd and some lie outside of it, which of the entries those are.
    """
    (right, bottom), corners = _patches(out, in_, count, seed, 2)
    width = _untrimmed(in_, 2)
    first, block = torch.unique(corners, return_inverse=True)
    slots = (2 * bottom + right) * len(first) + block
    rows = torch.cat([first // width + step for step in (0, 0, 1, 1)])
    columns = torch.cat([first % width + step for step in (0, 1, 0, 1)])
    within = (rows < out) & (columns < in_)
    inside = None if within.all() else within.nonzero().flatten()
    return len(first), slots, (rows * in_ + columns)[within], inside
