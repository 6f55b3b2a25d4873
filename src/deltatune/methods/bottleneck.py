"""What the bottleneck adapters have in common: A(h) = s·(Up·σ(Down·h + a) + b), a narrow network inside a block.

h is (tokens, d), Down (m, d), Up (d, m), m = d / reduction, σ a nonlinearity. After a sub-layer the adapter acts on
what that gives, before it is added to the residual stream: h + A(h). It stands over the sub-layer's last linear
layer, whose output h is; dropout, in models that have some there, comes after it, where the papers have it before.
Beside a sub-layer it acts on what goes in.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deltatune.errors import UserError
from deltatune.methods.contract import BlockInsert, Site
from deltatune.methods.through import through_frozen
from deltatune.methods.values import at_least_one, positive
from deltatune.weights import FrozenWeight

Activation = Literal["relu", "gelu", "silu", "tanh"]
Init = Literal["normal", "zero-up"]

ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
PASSED: Mapping[Activation, float] = {"relu": 1 / 2, "gelu": 1 / 4, "silu": 1 / 4, "tanh": 1.0}
"""The share of a small input's variance that each lets through."""

STD = 0.02
"""Standard deviation of the entries under `init=normal`."""


class Adapters(BlockInsert, Protocol):
    """A method of bottleneck adapters, with the answers that all of them give alike."""

    reduction: int
    activation: Activation
    init: Init
    scale: float
    suffixes: ClassVar[Mapping[str, str]] = {
        "adapter_down.weight": "down",
        "adapter_down.bias": "down_bias",
        "adapter_up.weight": "up",
        "adapter_up.bias": "up_bias",
    }
    written: ClassVar[tuple[str, ...]] = ("reduction", "activation", "scale")
    """The fields that adapter_config.json holds."""

    def check(self, site: Site) -> None:
        """Raises `UserError` for a layer that ends no sub-layer, and for a reduction that leaves no width."""
        ends_sub_layer(self, site)
        if self.reduction > site.out:
            raise UserError(
                f"{self.name}: reduction {self.reduction} leaves nothing of a width of {site.out}",
                f"the largest is {site.out}",
            )

    def parameters(self, site: Site) -> int:
        """Trained parameters of one site: Down, Up and their biases, 2dm + m + d."""
        d, m = site.out, site.out // self.reduction
        return 2 * d * m + m + d

    def start_distance(self, site: Site) -> float:
        """Of `normal`: that of s·Up·σ(Down·h), for Down·h so small that σ is as around 0."""
        if self.init == "zero-up":
            return 0.0
        return self.scale * STD**2 * math.sqrt(site.out // self.reduction * site.out * PASSED[self.activation])

    def delta(
        self, site: Site, weight: FrozenWeight, shared: nn.Module | None, generator: torch.Generator
    ) -> nn.Module:
        """A fresh adapter: Up and Down N(0, 0.02²), or Down Kaiming-uniform and Up 0; biases 0."""
        d, m = site.out, site.out // self.reduction
        if self.init == "normal":
            down, up = (STD * torch.randn(shape, generator=generator) for shape in ((m, d), (d, m)))
        else:
            bound = 1 / math.sqrt(d)  # Kaiming with a = √5
            down, up = torch.empty(m, d).uniform_(-bound, bound, generator=generator), torch.zeros(d, m)
        return Bottleneck(self, down, up)

    def to_peft(self, modules: Mapping[str, Any], deltas: Mapping[str, nn.Module]) -> dict[str, Any]:
        """The fields that decide the output, in PEFT's layout."""
        return {name: getattr(self, name) for name in self.written}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "Adapters":
        """Reads what `to_peft` wrote."""
        return cls(**{name: config[name] for name in cls.written if name in config})


class Insertion(nn.Module):
    """An insert, after a sub-layer or beside it, of which `added` says everything."""

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.beside = beside

    def added(self, h: Float[Tensor, "tokens out"]) -> Float[Tensor, "tokens out"]:
        """A(h)."""
        raise NotImplementedError

    def forward(
        self,
        x: Float[Tensor, "tokens in"],
        weight: FrozenWeight,
        bias: Float[Tensor, " out"] | None,
        beside: Float[Tensor, "tokens out"] | None = None,
    ) -> Float[Tensor, "tokens out"]:
        """What the sub-layer gives, x·Wᵀ + bias, plus A of that, or A of `beside`, which went into it."""
        assert (beside is not None) == self.beside
        y = through_frozen(x, weight, bias)
        return y + self.added(y if beside is None else beside)


class Bottleneck(Insertion):
    """Down (m, d) with a bias (m,) and Up (d, m) with a bias (d,)."""

    def __init__(self, method: Adapters, down: Float[Tensor, "m d"], up: Float[Tensor, "d m"]) -> None:
        super().__init__(method.beside)
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.down_bias, self.up_bias = nn.Parameter(torch.zeros(down.shape[0])), nn.Parameter(torch.zeros(up.shape[0]))
        self.activation, self.scale = method.activation, method.scale

    def added(self, h: Float[Tensor, "tokens out"]) -> Float[Tensor, "tokens out"]:
        """s·(Up·σ(Down·h + a) + b), in the type of h."""
        return bottleneck(h, self.down, self.down_bias, self.activation, self.up, self.up_bias, self.scale)


def bottleneck(
    h: Float[Tensor, "tokens d"],
    down: Float[Tensor, "m d"],
    down_bias: Float[Tensor, " m"],
    activation: Activation,
    up: Float[Tensor, "d m"],
    up_bias: Float[Tensor, " d"],
    scale: float,
) -> Float[Tensor, "tokens d"]:
    """scale·(Up·σ(Down·h + a) + b), in the type of h; the parameters are brought to it where they meet it."""
    z = ACTIVATIONS[activation](F.linear(h, down.to(h.dtype), down_bias.to(h.dtype)))  # (tokens, m)
    added = F.linear(z, up.to(h.dtype), up_bias.to(h.dtype))
    return added if scale == 1 else scale * added


def in_range(method: Adapters) -> None:
    """Raises `UserError` for hyperparameters that no layer could have."""
    at_least_one(method.name, reduction=method.reduction)
    positive(method.name, scale=method.scale)


def ends_sub_layer(method: BlockInsert, site: Site) -> None:
    """Raises `UserError` for a layer inside of a sub-layer, and beside for one whose begin is not known."""
    if site.role not in ("attention-output", "attention", "down", "other") or site.embedding:
        raise UserError(
            f"{method.name} stands where a sub-layer ends, and a layer of the role {site.role} ends none",
            "use targets such as attention-output and mlp-down",
        )
    if method.beside and not site.begin:
        raise UserError(
            f"{method.name} stands beside a feed-forward sub-layer, and of this one no layer of the role up or gate is "
            "known, where it begins",
            "use targets=mlp-down, or a method that stands after a sub-layer, such as pfeiffer",
        )
