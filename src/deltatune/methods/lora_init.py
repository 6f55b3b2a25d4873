"""Where LoRA's training begins: the first A and B.

    kaiming      A uniform in ±1/√in, B = 0                                   Hu et al. 2021, arXiv 2106.09685
    gaussian     A normal with deviation 1/rank, B = 0                        PEFT
    orthogonal   neither is zero, and B·A is: their middles are orthogonal    PEFT; datta0.github.io, rethink-lora-init
    pissa        B·A = W_r / s, the largest singular components of W          Meng et al. 2024, arXiv 2404.02948
    olora        first columns of Q, first rows of R, where W = Q·R           Büyükakyüz 2024, arXiv 2406.01775
    eva          A = the directions that hold most of the inputs, B = 0       Paischer et al. 2024, arXiv 2410.07170
    lora-ga      A and B span the largest components of the loss's gradient   Wang et al. 2024, arXiv 2407.05000
    loftq        B·A = R_r / s, the largest components of R, what storing W   Li et al. 2023, arXiv 2310.08659
                 in fewer bits lost

`MOVES` begin with B·A ≠ 0. Their papers take s·B₀·A₀ out of W, so that training still starts at the base. Here W keeps
its bits and the delta holds A₀ and B₀ beside: W' = W + s·(B·A − B₀·A₀), which is W at the start and has rank 2·rank.

loftq starts off the stored base on purpose, nearer to the base that was stored. It is algorithm 1 with one alternation,
PEFT's default as well: more of them would write other codes, and the adapter then belong to no base that has a name.
"""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from deltatune.errors import UserError
from deltatune.methods.contract import Observer, Site
from deltatune.weights import FrozenWeight

Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "lora-ga", "loftq"]
MOVES: frozenset[Init] = frozenset({"pissa", "olora", "lora-ga"})
"""Those that begin with a product that is not zero."""

_EXACT = 512
"""Up to this many rows or columns a singular value decomposition is exact; above, randomised, as the papers have it."""
_CONVERGED = 0.99
"""EVA: cosine between a direction before and after a batch from which on it counts as found."""
_SPREAD = 2
"""EVA: the most ranks that a layer may get, as a multiple of its own."""
_GAMMA = 16
"""LoRA-GA: γ, which sets the size of A and B."""
_GRADIENTS = 8
"""LoRA-GA: batches whose gradients are averaged."""


def first_factors(
    init: Init, rank: int, scale: float, site: Site, weight: FrozenWeight, generator: torch.Generator
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """A and B before training. Those of eva, lora-ga and loftq are kaiming's until their observers have seen."""
    if init == "pissa":
        return _split(weight.dense().float(), rank, scale)
    if init == "olora":
        W = weight.dense().float()
        B = torch.linalg.qr(W[:, :rank]).Q  # the first columns of Q need no others of W
        return B.T @ W, B
    if init == "orthogonal":
        # The rows of a rotation are orthogonal: dealt to A and B in turn, they leave nothing of the product.
        rows = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
        A = rows[0::2].T @ torch.randn(rank // 2, site.in_, generator=generator) / 10
        B = torch.randn(site.out, rank // 2, generator=generator) @ rows[1::2] / 10
        return A, B
    B = torch.zeros(site.out, rank)
    if init == "gaussian":
        return torch.randn(rank, site.in_, generator=generator) / rank, B
    bound = 1 / math.sqrt(site.in_)
    return torch.empty(rank, site.in_).uniform_(-bound, bound, generator=generator), B


class InputDirections:
    """EVA: the right singular vectors of all inputs seen so far, by an incremental decomposition.

    Twice as many as the rank, for `spread_ranks` to choose from; it is done when as many as the rank stand still.
    """

    of: ClassVar[Literal["inputs", "gradients", "losses"]] = "inputs"

    def __init__(self, rank: int, site: Site) -> None:
        self.rank, self.most = rank, min(_SPREAD * rank, site.out, site.in_)
        self.done = False
        self.directions: Tensor | None = None  # (components, in)
        self._sizes: Tensor | None = None  # (components,): singular values
        self._energy = 0.0

    def see(self, seen: Float[Tensor, "rows columns"]) -> None:
        """Adds input vectors (tokens, in)."""
        seen, before = seen.float(), self.directions
        self._energy += seen.square().sum().item()
        if before is not None and self._sizes is not None:
            seen = torch.cat((self._sizes[:, None] * before, seen))
        _, self._sizes, self.directions = largest_components(seen, self.most, exact=4 * self.most)
        if before is not None and len(before) == len(self.directions) == self.most:
            cosines = (before * self.directions).sum(1).abs()
            self.done = bool((cosines[: self.rank] > _CONVERGED).all())

    @property
    def explained(self) -> list[float]:
        """Each direction's share of the inputs' squared length, the largest first."""
        return [] if self._sizes is None else (self._sizes.square() / self._energy).tolist()


class MeanGradient:
    """LoRA-GA: the sum, as good as the mean, of the gradients of some batches."""

    of: ClassVar[Literal["inputs", "gradients", "losses"]] = "gradients"

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self._count = 0

    @property
    def done(self) -> bool:
        """Whether enough batches were seen."""
        return self._count >= _GRADIENTS

    def see(self, seen: Float[Tensor, "rows columns"]) -> None:
        """Adds a gradient (out, in)."""
        self.sum = seen.float() if self.sum is None else self.sum.add_(seen)
        self._count += 1

    def factors(self, rank: int) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
        """A: the first `rank` right singular vectors. B: the left ones of the next. Both times out^¼ / √γ."""
        assert self.sum is not None
        U, _, Vh = largest_components(self.sum, 2 * rank)
        size = len(U) ** 0.25 / math.sqrt(_GAMMA)
        return size * Vh[:rank], size * U[:, rank : 2 * rank]


class StorageLoss:
    """LoftQ: the factors of what storing the weight in fewer bits lost."""

    of: ClassVar[Literal["inputs", "gradients", "losses"]] = "losses"

    def __init__(self, rank: int, scale: float) -> None:
        self.rank, self.scale = rank, scale
        self.factors: tuple[Tensor, Tensor] | None = None

    @property
    def done(self) -> bool:
        """Whether it was seen."""
        return self.factors is not None

    def see(self, seen: Float[Tensor, "out in"]) -> None:
        """Takes W − Q apart."""
        self.factors = _split(seen.float(), self.rank, self.scale)


def spread_ranks(ranks: Mapping[str, int], observers: Mapping[str, Observer]) -> dict[str, int]:
    """EVA: the ranks of all layers, dealt anew to the directions that explain most. Their sum stays.

    Every layer keeps its first direction, so that none is left without an update.
    """
    explained: list[tuple[float, str]] = []
    for path, rank in ranks.items():
        observer = observers[path]
        assert isinstance(observer, InputDirections)
        if len(observer.explained) < rank:
            raise UserError(
                f"{path}: init=eva needs at least {rank} input vectors, the examples gave {len(observer.explained)}",
                "give more or larger batches of examples, or lower the rank",
            )
        explained += [(share, path) for share in observer.explained[1:]]
    best = sorted(explained, key=lambda entry: -entry[0])[: sum(ranks.values()) - len(ranks)]
    return {path: 1 + sum(path == chosen for _, chosen in best) for path in ranks}


def _split(
    matrix: Float[Tensor, "out in"], rank: int, scale: float
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """A and B of the same size with scale·B·A = the largest components of the matrix."""
    U, S, Vh = largest_components(matrix, rank)
    root = (S / scale).sqrt()
    return root[:, None] * Vh, U * root


def largest_components(
    matrix: Float[Tensor, "rows columns"], count: int, exact: int = _EXACT
) -> tuple[Float[Tensor, "rows components"], Float[Tensor, " components"], Float[Tensor, "components columns"]]:
    """U, S and Vᵀ of the `count` largest singular values, or of as many as there are.

    Where both sides are longer than `exact`, by a randomised method (Halko et al. 2011, arXiv 0909.4061).
    """
    count = min(count, *matrix.shape)
    if min(matrix.shape) <= exact:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(matrix, q=min(count + 16, *matrix.shape), niter=4)
        Vh = V.T
    return U[:, :count], S[:count], Vh[:count]
