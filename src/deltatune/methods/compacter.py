"""Compacter: adapters whose matrices are sums of Kronecker products, of small factors that the whole model shares.

Mahabadi et al. 2021, arXiv 2106.04647, section 3 (low-rank parameterised hypercomplex layers; Zhang et al. 2021,
arXiv 2102.08597).   h ← h + Up·σ(Down·h + a) + b   after each attention and each feed-forward sub-layer

    Down = Σᵢ Aᵢ ⊗ (sᵢ·tᵢ)      i = 1 … n,   Aᵢ (n, n) shared by every Down and Up,   sᵢ (m/n, rank), tᵢ (rank, d/n)
    Up   = Σᵢ Aᵢ ⊗ (uᵢ·vᵢ)                                                           uᵢ (d/n, rank), vᵢ (rank, m/n)

m = d / reduction. An adapter has 2·rank·(d + m) + m + d parameters of its own, and the model n³ that are shared. Down
and Up are made whole in each step: in 16 bits that is as fast as products with the factors one by one, or faster.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltatune.errors import UserError
from deltatune.methods.bottleneck import PASSED, Activation, Adapters, Init, Insertion, bottleneck, in_range
from deltatune.methods.contract import CONFIG, Site, Targets
from deltatune.methods.values import at_least_one
from deltatune.weights import FrozenWeight

_STD = 0.01
"""Standard deviation of the first shared factors, as in the authors' experiments."""


@dataclass(frozen=True)
class Compacter(Adapters):
    """Inserts a small network after each sub-layer, made of Kronecker products that share factors over the model."""

    reduction: int = 32
    """How much narrower than the model the bottleneck is: m = d / reduction, rounded down."""
    n: int = 4
    """Terms of each sum, and the side of the shared factors; it divides d and m."""
    rank: int = 1
    """Rank of the other factors of the products."""
    activation: Activation = "gelu"
    """The nonlinearity: relu, gelu, silu or tanh."""
    init: Init = "normal"
    """First values: normal, all factors random, near the base; or zero-up, which starts at the base itself."""
    scale: float = 1.0
    """Factor of what the adapter adds."""
    targets: Targets = ("attention-output", "mlp-down")
    """Layers that end the sub-layers: attention-output, mlp-down, module names or regular expressions."""
    leave_out: tuple[int, ...] = ()
    """Numbers of the blocks without an adapter, from 0; a decoder's blocks follow its encoder's."""

    name: ClassVar[str] = "compacter"
    title: ClassVar[str] = "Compacter"
    paper: ClassVar[str] = "arXiv 2106.04647"
    learning_rate: ClassVar[float] = 1e-2
    grows_by: ClassVar[str] = "reduction"
    peft_type: ClassVar[str] = "DELTATUNE_COMPACTER"
    suffixes: ClassVar[Mapping[str, str]] = {
        "compacter_s": "s",
        "compacter_t": "t",
        "compacter_u": "u",
        "compacter_v": "v",
        "adapter_down.bias": "down_bias",
        "adapter_up.bias": "up_bias",
    }
    shared_suffixes: ClassVar[Mapping[str, str]] = {"compacter_A": "A"}
    written: ClassVar[tuple[str, ...]] = (*Adapters.written, "n", "rank")
    __pydantic_config__ = CONFIG

    def __post_init__(self) -> None:
        in_range(self)
        at_least_one("compacter", n=self.n, rank=self.rank)

    def check(self, site: Site) -> None:
        """Raises `UserError` for a layer that ends no sub-layer, and where n does not divide d and m."""
        super().check(site)
        d, m, n = site.out, site.out // self.reduction, self.n
        if d % n or m % n:
            sides = [side for side in range(1, m + 1) if d % side == m % side == 0]
            reductions = [r for r in range(1, d + 1) if d % n == 0 and d // r % n == 0 and d // r >= n]
            near = sorted(reductions, key=lambda r: abs(r - self.reduction))[:2]
            raise UserError(
                f"compacter: n {n} does not divide the width {d} and the bottleneck's {m}",
                f"the nearest n that fit: {', '.join(map(str, sorted(sides, key=lambda side: abs(side - n))[:3]))}"
                + (f"; the nearest reductions: {', '.join(map(str, near))}" if near else ""),
            )
        if self.rank > m // n:
            raise UserError(
                f"compacter: rank {self.rank} is more than factors of {m // n}×{d // n} have",
                f"the largest is {m // n}",
            )

    def parameters(self, site: Site) -> int:
        """Trained parameters of one site: s, t, u, v and the biases."""
        d, m = site.out, site.out // self.reduction
        return 2 * self.rank * (d + m) + d + m

    def shared_parameters(self, sites: Sequence[Site]) -> int:
        """The n matrices A of n × n."""
        return self.n**3

    def start_distance(self, site: Site) -> float:
        """Of `normal`: that of s·Up·σ(Down·h), for Down·h so small that σ is as around 0."""
        if self.init == "zero-up":
            return 0.0
        d, m = site.out, site.out // self.reduction
        p, q = m // self.n, d // self.n
        entry = self.n * self.rank * _STD**2 * 2 / (p + self.rank) * 2 / (self.rank + q)  # variance in Down, and in Up
        return self.scale * entry * math.sqrt(d * m * PASSED[self.activation])

    def share(self, sites: Sequence[Site], generator: torch.Generator) -> "SharedFactors":
        """The factors A."""
        return SharedFactors(self.n, generator)

    def delta(
        self, site: Site, weight: FrozenWeight, shared: nn.Module | None, generator: torch.Generator
    ) -> "CompacterInsert":
        """A fresh adapter: factors Glorot-uniform, or u zero; biases 0."""
        assert isinstance(shared, SharedFactors)
        return CompacterInsert(site, self, shared, generator)


class SharedFactors(nn.Module):
    """A (n, n, n): the n small matrices that every Down and Up of the model shares."""

    def __init__(self, n: int, generator: torch.Generator) -> None:
        super().__init__()
        self.A = nn.Parameter(_STD * torch.randn(n, n, n, generator=generator))


class CompacterInsert(Insertion):
    """s (n, m/n, rank), t (n, rank, d/n), u (n, d/n, rank), v (n, rank, m/n), two biases, and the shared factors."""

    def __init__(self, site: Site, method: Compacter, shared: SharedFactors, generator: torch.Generator) -> None:
        super().__init__(method.beside)
        n, rank, m = method.n, method.rank, site.out // method.reduction
        p, q = m // n, site.out // n
        self.s, self.t = _glorot(n, p, rank, generator), _glorot(n, rank, q, generator)
        self.u, self.v = _glorot(n, q, rank, generator), _glorot(n, rank, p, generator)
        if method.init == "zero-up":
            nn.init.zeros_(self.u)
        self.down_bias, self.up_bias = nn.Parameter(torch.zeros(m)), nn.Parameter(torch.zeros(site.out))
        self.shared = shared
        self.activation, self.scale = method.activation, method.scale

    def added(self, h: Float[Tensor, "tokens out"]) -> Float[Tensor, "tokens out"]:
        """scale·(Up·σ(Down·h + a) + b), in the type of h."""
        down, up = sum_of_products(self.shared.A, self.s, self.t), sum_of_products(self.shared.A, self.u, self.v)
        return bottleneck(h, down, self.down_bias, self.activation, up, self.up_bias, self.scale)


def sum_of_products(
    A: Float[Tensor, "n n n"], left: Float[Tensor, "n p rank"], right: Float[Tensor, "n rank q"]
) -> Float[Tensor, "rows columns"]:
    """Σᵢ Aᵢ ⊗ (leftᵢ·rightᵢ), with n·p rows and n·q columns: all sums in one product, then the blocks put in order."""
    n, p, q = A.shape[0], left.shape[1], right.shape[2]
    blocks = A.reshape(n, n * n).T @ (left @ right).flatten(1)  # (n·n, p·q)
    return blocks.view(n, n, p, q).transpose(1, 2).reshape(n * p, n * q)


def _glorot(n: int, rows: int, columns: int, generator: torch.Generator) -> nn.Parameter:
    """n matrices, each uniform in ±√(6 / (rows + columns))."""
    bound = math.sqrt(6 / (rows + columns))
    return nn.Parameter(torch.empty(n, rows, columns).uniform_(-bound, bound, generator=generator))
