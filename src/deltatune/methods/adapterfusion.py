"""AdapterFusion: several trained adapters, frozen, and an attention that learns how much of each a token needs.

Pfeiffer et al. 2020, arXiv 2005.00247, section 3.2.   With h what a feed-forward sub-layer gives and zₙ = Aₙ(h):

    h ← h + V·Σₙ sₙ·zₙ        s = softmax over n of (Q·h + a)·(K·zₙ)

    h ──┬───────────────────────────────────────── + ──       Q, K, V (d, d) and a (d,) train:
        ├── A₁ … A_N ── z₁ … z_N ── Σ sₙ·zₙ ── V ──┘         3d² + d parameters
        └── Q ────────── scores ───────┘

V starts as the identity (10⁻⁶ off the diagonal) and is drawn to it by a penalty; training starts near the mean of the
adapters. The authors' code has a bias in K as well: it adds the same to every score, which softmax takes out again, so
that it can change nothing and is left out. The adapters are part of what is saved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from deltatune.errors import UserError
from deltatune.files import read_json, sha256
from deltatune.methods.bottleneck import ACTIVATIONS, Bottleneck, Insertion, ends_sub_layer
from deltatune.methods.contract import CONFIG, BlockInsert, Site, Targets
from deltatune.methods.pfeiffer import Pfeiffer
from deltatune.weights import FrozenWeight

_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterFusion(BlockInsert):
    """Learns how to mix several trained adapters, which stay as they are."""

    adapters: tuple[str, ...] = ()
    """Folders of two or more saved pfeiffer adapters of this base."""
    parts: tuple[Pfeiffer, ...] = ()
    """Hyperparameters of these adapters; read from their folders."""
    regularisation: float = 0.01
    """Weight of the penalty ‖V − I‖² of each layer."""
    targets: Targets = "mlp-down"
    """Layers that end the feed-forward sub-layers, where the adapters stand."""
    leave_out: tuple[int, ...] = ()
    """Numbers of the blocks without a fusion, from 0; those that the adapters leave out."""

    name: ClassVar[str] = "adapterfusion"
    title: ClassVar[str] = "AdapterFusion"
    paper: ClassVar[str] = "arXiv 2005.00247"
    learning_rate: ClassVar[float] = 1e-3
    peft_type: ClassVar[str] = "DELTATUNE_ADAPTERFUSION"
    suffixes: ClassVar[Mapping[str, str]] = {
        "fusion_query.weight": "Q",
        "fusion_query.bias": "a",
        "fusion_key.weight": "K",
        "fusion_value.weight": "V",
        "fusion_adapters.down.weight": "down",
        "fusion_adapters.down.bias": "down_bias",
        "fusion_adapters.up.weight": "up",
        "fusion_adapters.up.bias": "up_bias",
    }
    __pydantic_config__ = CONFIG

    def __post_init__(self) -> None:
        if not 0 <= self.regularisation < float("inf"):
            raise UserError(f"adapterfusion: regularisation must be 0 or a positive number, not {self.regularisation}")
        if self.adapters and not self.parts:
            object.__setattr__(self, "parts", tuple(_read(folder) for folder in self.adapters))

    def check(self, site: Site) -> None:
        """Raises `UserError` for fewer than two adapters, and for one that does not stand at the site."""
        ends_sub_layer(self, site)
        if len(self.parts) < 2:
            raise UserError(
                f"adapterfusion mixes two or more trained adapters, and there are {len(self.parts)}",
                "train some with pfeiffer and name their folders: adapters=[one, another]",
            )
        for part in self.parts:
            part.check(site)
        for folder, part in zip(self.adapters, self.parts, strict=False):
            m = site.out // part.reduction
            if _tensors(folder, site.path).get("down", torch.empty(0)).shape != (m, site.out):
                raise UserError(
                    f"adapterfusion: {folder} has no adapter of this size here",
                    "leave out the blocks that one of the adapters leaves out, or use adapters of this base",
                )

    def check_base(self, fingerprint: str) -> None:
        """Raises `UserError` where one of the adapters was trained on another base."""
        for folder in self.adapters:
            if read_json(_inside(folder) / "deltatune.json")["base"]["fingerprint"] != fingerprint:
                raise UserError(
                    f"adapterfusion: {folder} was trained on another base", "fuse adapters of the base that they are on"
                )

    def parameters(self, site: Site) -> int:
        """Trained parameters of one site: Q with its bias, K and V."""
        return 3 * site.out**2 + site.out

    def stored_parameters(self, sites: Sequence[Site]) -> int:
        """Numbers in a file: those that train, and the frozen adapters."""
        return sum(self.parameters(site) + sum(part.parameters(site) for part in self.parts) for site in sites)

    def start_distance(self, site: Site) -> float:
        """That of the mean of the adapters, if they were fresh: what trained ones add is not known from shapes."""
        return float(sum(part.start_distance(site) ** 2 for part in self.parts) ** 0.5 / len(self.parts))

    def delta(self, site: Site, weight: FrozenWeight, shared: nn.Module | None, generator: torch.Generator) -> "Fusion":
        """A fresh fusion over the saved adapters; over fresh ones where no folders are named, until it is restored."""
        adapters = [part.delta(site, weight, None, generator) for part in self.parts]
        with torch.no_grad():
            for folder, adapter in zip(self.adapters, adapters, strict=False):
                for name, tensor in _tensors(folder, site.path).items():
                    getattr(adapter, name).copy_(tensor)
        return Fusion(site.out, self, [a for a in adapters if isinstance(a, Bottleneck)], generator)

    def penalty(self, deltas: Mapping[str, nn.Module]) -> Float[Tensor, ""] | None:
        """regularisation · Σ ‖V − I‖²."""
        values = [delta.V for delta in deltas.values() if isinstance(delta, Fusion)]
        if not (self.regularisation and values):
            return None
        strays = [(V - torch.eye(V.shape[0], device=V.device)).square().sum() for V in values]
        return self.regularisation * torch.stack(strays).sum()

    def portable(self) -> "AdapterFusion":
        """The same without the folders: a file holds the adapters itself."""
        return replace(self, adapters=())

    def to_peft(self, modules: Mapping[str, Any], deltas: Mapping[str, nn.Module]) -> dict[str, Any]:
        """The penalty and what the adapters are, in PEFT's layout."""
        return {"regularisation": self.regularisation, "parts": [asdict(part) for part in self.parts]}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "AdapterFusion":
        """Reads what `to_peft` wrote."""
        parts = tuple(cast(Pfeiffer, Pfeiffer.from_peft(part)) for part in config["parts"])
        return cls(parts=parts, regularisation=config["regularisation"])


class Fusion(Insertion):
    """Q, K, V (d, d) and a (d,), which train, over frozen adapters: their matrices side by side, M wide together.

    down (M, d), down_bias (M,), up (d, M), up_bias (N, d).
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor

    def __init__(
        self, d: int, method: AdapterFusion, adapters: Sequence[Bottleneck], generator: torch.Generator
    ) -> None:
        super().__init__(method.beside)
        self.Q, self.K = (nn.Parameter(0.02 * torch.randn(d, d, generator=generator)) for _ in range(2))
        self.a = nn.Parameter(torch.zeros(d))
        self.V = nn.Parameter(torch.full((d, d), 1e-6).fill_diagonal_(1.0))
        self.parts = method.parts
        self.widths = [adapter.down.shape[0] for adapter in adapters]
        self.register_buffer("down", torch.cat([adapter.down.detach() for adapter in adapters]))
        self.register_buffer("down_bias", torch.cat([adapter.down_bias.detach() for adapter in adapters]))
        self.register_buffer("up", torch.cat([adapter.up.detach() for adapter in adapters], dim=1))
        self.register_buffer("up_bias", torch.stack([adapter.up_bias.detach() for adapter in adapters]))

    def mixed(self, h: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens adapters d"]:
        """zₙ, what each adapter adds to h."""
        narrow = torch.split(F.linear(h, self.down.to(h.dtype), self.down_bias.to(h.dtype)), self.widths, dim=1)
        ups = torch.split(self.up.to(h.dtype), self.widths, dim=1)
        z = [
            part.scale * F.linear(ACTIVATIONS[part.activation](x), up, bias)
            for part, x, up, bias in zip(self.parts, narrow, ups, self.up_bias.to(h.dtype), strict=True)
        ]
        return torch.stack(z, dim=1)

    def added(self, h: Float[Tensor, "tokens out"]) -> Float[Tensor, "tokens out"]:
        """V·Σₙ sₙ·zₙ, in the type of h; (Q·h + a)·(K·zₙ) is computed as (Kᵀ·(Q·h + a))·zₙ, once for all adapters."""
        z = self.mixed(h)
        wanted = F.linear(h, self.Q.to(h.dtype), self.a.to(h.dtype)) @ self.K.to(h.dtype)  # (tokens, d)
        s = (z @ wanted[:, :, None])[:, :, 0].softmax(1, dtype=torch.promote_types(h.dtype, torch.float32))
        return F.linear((s.to(h.dtype)[:, None] @ z)[:, 0], self.V.to(h.dtype))


def _inside(folder: str) -> Path:
    """Where in a folder the adapter lies: there, or below where a run wrote it."""
    path = Path(folder).expanduser()
    return path if (path / _FILE).is_file() else path / "adapter"


def _read(folder: str) -> Pfeiffer:
    """The hyperparameters of a saved adapter; raises `UserError` where it is none of pfeiffer's, or was changed."""
    inside = _inside(folder)
    if not (inside / _FILE).is_file():
        raise UserError(f"adapterfusion: {folder} holds no adapter", "give folders that `tune --out` wrote")
    config, record = read_json(inside / "adapter_config.json"), read_json(inside / "deltatune.json")
    if not Pfeiffer.reads(config):
        raise UserError(
            f"adapterfusion: {folder} is an adapter of type {config.get('peft_type')}, not of pfeiffer",
            "train the adapters with --method pfeiffer",
        )
    if record["sha256"].get(_FILE) not in (None, sha256(inside / _FILE)):
        raise UserError(f"{inside / _FILE} is damaged: it is not the file that was saved", "train it again")
    return cast(Pfeiffer, Pfeiffer.from_peft(config))


def _tensors(folder: str, path: str) -> dict[str, Tensor]:
    """The tensors of a saved adapter at one layer, by their attributes; none where it leaves the layer out."""
    names = {f"base_model.model.{path}.{suffix}": name for suffix, name in Pfeiffer.suffixes.items()}
    try:
        with safe_open(_inside(folder) / _FILE, "pt") as file:
            return {names[key]: file.get_tensor(key) for key in file.keys() if key in names}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"adapterfusion: the adapter in {folder} cannot be read: {error}") from error
