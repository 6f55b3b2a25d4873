"""LoRA adapters of one base made into a new one, by what each adds to a weight: ΔW = s·B·A, never A and B apart.

linear   Σ wᵢ·ΔWᵢ, exactly: the factors side by side, [w₁s₁B₁ … wₙsₙBₙ]·[A₁; …; Aₙ], so that the ranks add up
svd      the nearest product of a given rank to that sum (Eckart and Young 1936), found from the factors alone
ties     ΔWᵢ trimmed to their largest entries, a sign elected for each entry, the mean of those that have it
         (Yadav et al. 2023, arXiv 2306.01708, algorithm 1); then its nearest product
dare     entries of ΔWᵢ dropped at random, the others rescaled, and summed
         (Yu et al. 2023, arXiv 2311.03099); then its nearest product
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltatune.errors import UserError, unknown
from deltatune.methods import LoRA, OverLayers
from deltatune.methods.values import at_least_one
from deltatune.models.adapted import Adapted
from deltatune.models.attach import Attachment, adapted_layers, attach, attachments

WAYS = ("linear", "svd", "ties", "dare")

_DENSITY: Mapping[str, float] = {"ties": 0.2, "dare": 0.1}
"""Share of entries that is kept where none is given: TIES keeps the largest 20 %, DARE's abstract drops 90 %."""


@dataclass(frozen=True)
class Combined:
    """What combining made: a LoRA adapter that is attached, active, and held against what the rule gives exactly."""

    name: str
    method: LoRA
    """Every scale is folded into B, so that alpha / rank is 1 on each layer."""
    error: float
    """‖ΔW − B·A‖ / ‖ΔW‖ over all layers, in the Frobenius norm; 0 where nothing was cut off."""
    errors: Mapping[str, float] = field(repr=False)
    """The same of each layer, by path."""


@dataclass(frozen=True)
class _Rule:
    """How ΔW are combined: the arguments of `combine`, with what was left out filled in."""

    how: str
    rank: int
    density: float
    total: float
    """Of the weights: TIES' λ."""


@dataclass(frozen=True)
class _Part:
    """What one adapter adds to one layer, in float64: ΔW = B·A, its scale folded into B."""

    weight: float
    B: Float[Tensor, "out rank"]
    A: Float[Tensor, "rank in"]


@dataclass(frozen=True)
class _Product:
    """The new factors of one layer, and the squared norms of what they leave out and of all."""

    B: Float[Tensor, "out rank"]
    A: Float[Tensor, "rank in"]
    cut: float
    whole: float


@torch.no_grad()
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    *,
    name: str,
    how: str = "linear",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Combined:
    """Makes the LoRA adapter `name` of attached ones, by name with their weights, and makes it the active one.

    Layers, ranks and scales may differ; a layer that an adapter leaves alone has a ΔW of 0 there. `linear` is exact.
    The others find the nearest product of `rank`; left out, the largest rank of the adapters. `ties` and `dare` make
    ΔW whole, one layer at a time, and keep the share `density` of each adapter's entries in it (left out: 0.2 and
    0.1); the sum of the weights is TIES' λ, so weights that sum to 1 give a mean. `seed` decides what `dare` drops.

    The new head is the mean of the adapters' heads by the same weights, made to sum to 1: that is for adapters of one
    task, with its labels in one order. Raises `UserError`, with the model unchanged, for adapters that are no LoRA in
    a file either, or that train biases, or whose heads differ, and for numbers out of range.
    """
    adapters = _adapters(model, weights)
    rule = _rule(adapters, weights, how, rank, density)
    layers = {path: layer for path, layer in adapted_layers(model).items() if any(path in a.modules for a in adapters)}
    parts = {path: _parts(path, layer, adapters, weights) for path, layer in layers.items()}
    ranks = {path: _rank(layer, parts[path], rule) for path, layer in layers.items()}
    most = max(ranks.values())
    fewer = {path: own for path, own in ranks.items() if own != most}
    # With alpha = rank every scale is 1. So a reader that knows no patterns, such as vLLM, is right as well.
    alphas = {path: float(own) for path, own in fewer.items()}
    method = LoRA(rank=most, alpha=float(most), targets=tuple(layers), rank_pattern=fewer, alpha_pattern=alphas)
    attach(model, method, name=name, head=adapters[0].head)
    generator = torch.Generator().manual_seed(seed)
    products: dict[str, _Product] = {}
    for path, layer in layers.items():
        made = products[path] = _product(parts[path], ranks[path], rule, generator)
        names = _suffixes(layer)
        method.restore(cast(nn.Module, layer.delta), dict(zip(names, (made.A, made.B), strict=True)))
    _average_heads(model, adapters, weights)
    errors = {path: _error([made]) for path, made in products.items()}
    return Combined(name, method, _error(products.values()), errors)


def _adapters(model: nn.Module, weights: Mapping[str, float]) -> list[Attachment]:
    """The attachments that are named; raises `UserError` where they cannot be combined."""
    every = attachments(model)
    if not weights:
        raise UserError("there is nothing to combine", "give adapters with their weights, such as {'a': 0.7, 'b': 0.3}")
    for name in weights:
        if name not in every:
            raise unknown("adapter", name, every)
    adapters = [every[name] for name in weights]
    for each in adapters:
        method = each.method.portable() if isinstance(each.method, OverLayers) else each.method
        if type(method) is not LoRA:
            raise UserError(
                f"'{each.name}' is a {each.method.name} adapter, and only LoRA's can be combined",
                "others add no product of two thin matrices to the weight",
            )
        if method.bias != "none":
            raise UserError(
                f"'{each.name}' trains biases, which are not combined", "train it with bias=none, or merge it alone"
            )
        if set(each.head) != set(adapters[0].head):
            raise UserError(
                f"'{adapters[0].name}' and '{each.name}' have different heads, which have no mean",
                f"they are {', '.join(adapters[0].head) or 'none'} and {', '.join(each.head) or 'none'}",
            )
    return adapters


def _rule(
    adapters: Sequence[Attachment], weights: Mapping[str, float], how: str, rank: int | None, density: float | None
) -> _Rule:
    """The arguments of `combine`, checked."""
    if how not in WAYS:
        raise unknown("way of combining", how, WAYS)
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight == 0:
            raise UserError(
                f"the weight of '{name}' is {weight}", "give a number other than 0, or leave the adapter out"
            )
        if weight < 0 and how in _DENSITY:
            raise UserError(f"the weight of '{name}' is {weight}, which {how} has no meaning for", "use linear or svd")
    total = sum(weights.values())
    if adapters[0].head and math.isclose(total, 0, abs_tol=1e-9):
        raise UserError("the weights sum to 0, so the heads have no mean", "give weights that sum to something else")
    if rank is not None:
        if how == "linear":
            raise UserError("linear is exact: its rank is the sum of the ranks", "use svd for a given rank")
        at_least_one("combine", rank=rank)
    if density is not None:
        if how not in _DENSITY:
            raise UserError(f"{how} keeps every entry, so it has no density", f"{' and '.join(_DENSITY)} have one")
        if not 0 < density <= 1:
            raise UserError(f"density must be above 0 and at most 1, not {density}")
    ranks = [cast(LoRA, method.portable()).rank for each in adapters for method in each.modules.values()]
    return _Rule(how, rank or max(ranks), density or _DENSITY.get(how, 1.0), total)


def _parts(path: str, layer: Adapted, adapters: Sequence[Attachment], weights: Mapping[str, float]) -> list[_Part]:
    """What each adapter that has this layer adds to it."""
    parts = []
    for each in adapters:
        if path in each.modules:
            stored = each.modules[path].stored(layer.site, layer.deltas[each.name])
            scale = cast(LoRA, each.modules[path].portable()).scale
            A, B = (stored[suffix].double() for suffix in _suffixes(layer))
            if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
                raise UserError(f"'{each.name}' has values that are not finite at {path}", "it is damaged or diverged")
            parts.append(_Part(weights[each.name], scale * B, A))
    return parts


def _suffixes(layer: Adapted) -> tuple[str, str]:
    return ("lora_embedding_A", "lora_embedding_B") if layer.site.embedding else ("lora_A.weight", "lora_B.weight")


def _rank(layer: Adapted, parts: Sequence[_Part], rule: _Rule) -> int:
    """The rank that the result has on a layer: no more than it can use."""
    most = min(layer.site.out, layer.site.in_)
    summed = min(most, sum(part.A.shape[0] for part in parts))
    if rule.how == "linear":
        return summed
    return min(rule.rank, summed if rule.how == "svd" else most)


def _product(parts: Sequence[_Part], rank: int, rule: _Rule, generator: torch.Generator) -> _Product:
    """The combined ΔW of one layer, as the nearest product of that rank."""
    if rule.how in ("linear", "svd"):
        B = torch.cat([part.weight * part.B for part in parts], dim=1)  # (out, ranks)
        A = torch.cat([part.A for part in parts])  # (ranks, in)
        if rule.how == "linear" and rank == A.shape[0]:
            return _Product(B, A, cut=0.0, whole=((B.T @ B) * (A @ A.T)).sum().item())
        u, s, v = _svd_of_product(B, A)
    else:
        whole = _ties(parts, rule.density, rule.total) if rule.how == "ties" else _dare(parts, rule.density, generator)
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
    root = s[:rank].sqrt()
    cut, everything = s[rank:].square().sum().item(), s.square().sum().item()
    return _Product(u[:, :rank] * root, root[:, None] * v[:rank], cut, everything)


def _svd_of_product(
    B: Float[Tensor, "out rank"], A: Float[Tensor, "rank in"]
) -> tuple[Float[Tensor, "out core"], Float[Tensor, " core"], Float[Tensor, "core in"]]:
    """The SVD of B·A without B·A: with B = Q·R and Aᵀ = P·T that of the small core R·Tᵀ, turned by Q and P."""
    q, r = torch.linalg.qr(B)
    p, t = torch.linalg.qr(A.T)
    u, s, v = torch.linalg.svd(r @ t.T, full_matrices=False)
    return q @ u, s, v @ p.T


def _ties(parts: Sequence[_Part], density: float, total: float) -> Float[Tensor, "out in"]:
    """λ times the mean, by weight, of the trimmed entries whose sign has the greater weighted sum."""
    trimmed = torch.stack([_largest(part.B @ part.A, density) for part in parts])  # (adapters, out, in)
    weights = torch.tensor([part.weight for part in parts], dtype=trimmed.dtype, device=trimmed.device)[:, None, None]
    elected = (weights * trimmed).sum(0).sign()
    agreeing = weights * ((trimmed.sign() == elected) & (elected != 0))
    mean = (agreeing * trimmed).sum(0) / agreeing.sum(0).clamp_min(torch.finfo(trimmed.dtype).tiny)
    return total * mean


def _largest(delta: Float[Tensor, "out in"], density: float) -> Float[Tensor, "out in"]:
    """The share `density` of the entries that is largest in size, the others 0."""
    count = delta.numel()
    kept = max(1, round(density * count))
    threshold = delta.abs().flatten().kthvalue(count - kept + 1).values
    return torch.where(delta.abs() >= threshold, delta, 0.0)


def _dare(parts: Sequence[_Part], density: float, generator: torch.Generator) -> Float[Tensor, "out in"]:
    """The sum by weight of the entries that chance keeps, each divided by the chance to be kept."""
    summed: Tensor | None = None
    for part in parts:
        delta = part.B @ part.A
        kept = (torch.rand(delta.shape, generator=generator) < density).to(delta.device)
        added = delta.mul_(kept).mul_(part.weight / density)
        summed = added if summed is None else summed.add_(added)
    return cast(Tensor, summed)


def _average_heads(model: nn.Module, adapters: Sequence[Attachment], weights: Mapping[str, float]) -> None:
    """Gives the active adapter the mean of the others' heads, which are at rest."""
    total = sum(weights.values())
    for path in adapters[0].resting_head:
        mean = sum(weights[each.name] / total * each.resting_head[path].double() for each in adapters)
        model.get_parameter(path).copy_(cast(Tensor, mean))


def _error(products: Iterable[_Product]) -> float:
    """The relative error of these products together; 0 where there is nothing to be off from."""
    products = list(products)
    cut, whole = sum(made.cut for made in products), sum(made.whole for made in products)
    return math.sqrt(cut / whole) if cut else 0.0
