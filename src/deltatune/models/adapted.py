"""A layer with the deltas of one or more adapters over its frozen weight: what attaching puts in the layer's place."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from deltatune.errors import UserError
from deltatune.methods import Delta, EmbeddingDelta, Site
from deltatune.weights import FrozenWeight, QuantisedLinear, weight_of


class Adapted(nn.Module):
    """The frozen `base` layer and its `deltas` by the name of their adapter, of which one is active.

    With `active = None`, or a name that has no delta here, it gives the base's own output.
    """

    def __init__(self, base: nn.Module, site: Site) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self.deltas = nn.ModuleDict()
        self.active: str | None = None
        self.shows: dict[str, AdaptedLinear] = {}
        """By adapter: the layer whose insert stands beside the sub-layer that this one begins, and reads its input."""
        self._before_merge: tuple[Tensor, Tensor | None] | tuple[QuantisedLinear] | None = None

    def add(self, name: str, delta: nn.Module) -> None:
        """Puts a delta beside those that are here and makes it the active one."""
        self.deltas[name] = delta.train(self.training)
        self.active = name
        own = getattr(delta, "bias", None)
        if isinstance(own, nn.Parameter):
            with torch.no_grad():
                own.copy_(self.base.bias)  # type: ignore[arg-type]  # the site says that there is one

    def drop(self, name: str) -> None:
        """Forgets what an adapter has here."""
        if name in self.deltas:
            del self.deltas[name]
        self.shows.pop(name, None)

    @property
    def idle(self) -> bool:
        """Whether no adapter has anything here."""
        return not (self.deltas or self.shows)

    @property
    def delta(self) -> nn.Module | None:
        """The active delta; None where the layer is as the base has it."""
        deltas, active = self.deltas, self.active
        return deltas[active] if active is not None and active in deltas else None

    @property
    def frozen(self) -> FrozenWeight:
        """The base's weight, as methods see it."""
        return weight_of(self.base)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: model code that asks a layer for its type or shape finds it here."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        """The bias that the output has: the active delta's where it trains one, else the base's."""
        return self._bias_with(self.delta)

    @property
    def merged_bias(self) -> Tensor | None:
        """The bias that belongs to the merged weight."""
        change = getattr(self.delta, "merged_bias", None)
        return self.bias if change is None or self.bias is None or self.merged else cast(Tensor, change(self.bias))

    @property
    def merged(self) -> bool:
        """Whether the active delta stands in the base's weight now."""
        return self._before_merge is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Writes W' over W and keeps W's bits for `unmerge`. Raises `UserError` where W' is not finite.

        Over a quantised W, an ordinary layer with W' takes the base's place: encoding W' would lose what was learnt.
        """
        if self.merged or self.delta is None:
            return
        weight = cast(Delta, self.delta).merged(self.frozen.dense())
        if not torch.isfinite(weight).all():
            raise UserError("the merged weight has values that are not finite", "the adapter is damaged or diverged")
        bias, merged = getattr(self.base, "bias", None), self.merged_bias
        if isinstance(self.base, QuantisedLinear):
            self._before_merge = (self.base,)
            self.base = self.base.dense_layer(weight, merged)
            return
        self._before_merge = (self.frozen.dense().clone(), None if bias is None else bias.clone())
        self.frozen.write(weight)
        if bias is not None and merged is not None:
            bias.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts back the bits that W had before `merge`."""
        match self._before_merge:
            case (QuantisedLinear() as base,):
                self.base = base
            case (Tensor() as weight, bias):
                self.frozen.write(weight)
                if bias is not None:
                    cast(Tensor, self.base.bias).copy_(bias)
        self._before_merge = None

    def _bias_with(self, delta: nn.Module | None) -> Tensor | None:
        own = getattr(delta, "bias", None)
        return own if isinstance(own, nn.Parameter) else cast(Tensor | None, getattr(self.base, "bias", None))

    @property
    def _over(self) -> Any:
        """The delta that stands between the base's weight and the output now: a `Delta` or an `Insert`."""
        return None if self.merged else self.delta

    def extra_repr(self) -> str:
        """The states that change the output, when they are not the usual ones."""
        words = (
            ("merged", self.merged),
            (f"active={self.active}", len(self.deltas) > 1),
        )
        return ", ".join(word for word, holds in words if holds)


class AdaptedLinear(Adapted):
    """An adapted `nn.Linear` or `Conv1D`; behaves as the layer it replaces."""

    beside: Tensor | None = None
    """What went into the sub-layer that this layer ends, until the insert that stands beside it has read it."""

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out). Under autocast, in its type."""
        if self.active in self.shows:
            self.shows[self.active].beside = x
        output: Tensor
        over = self._over
        if over is None:
            output = self.base(x)
            return output
        shown: tuple[Tensor, ...] = ()
        if self.beside is not None:
            shown, self.beside = (_flat(self.beside),), None
        output = over(_flat(x), self.frozen, self._bias_with(over), *shown)
        return output.view(*x.shape[:-1], -1)

    @property
    def in_features(self) -> int:
        """Columns of W, as on `nn.Linear`."""
        return self.site.in_

    @property
    def out_features(self) -> int:
        """Rows of W, as on `nn.Linear`."""
        return self.site.out


def _flat(x: Tensor) -> Tensor:
    """x (…, features) as (tokens, features); under autocast, in its type."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return x.reshape(-1, x.shape[-1])


class AdaptedEmbedding(Adapted):
    """An adapted `nn.Embedding`; behaves as the layer it replaces."""

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (…) → vectors (…, width)."""
        vectors: Tensor = self.base(ids)
        over = self._over
        return vectors if over is None else cast(EmbeddingDelta, over)(ids, vectors, self.frozen)

    @property
    def num_embeddings(self) -> int:
        """Size of the vocabulary, as on `nn.Embedding`."""
        return self.site.in_

    @property
    def embedding_dim(self) -> int:
        """Width of a vector, as on `nn.Embedding`."""
        return self.site.out


class Added(nn.Module):
    """A module beside the base's own ones, put there by a method: nothing in it is the base's."""


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's parameters by their names in the base, as if nothing were attached."""
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, Adapted)]
    names = {
        f"{path}.base.{name}": f"{path}.{name}" for path, layer in layers for name, _ in layer.base.named_parameters()
    }
    beside = [*(layer.deltas for _, layer in layers), *(m for m in model.modules() if isinstance(m, Added))]
    added = {id(parameter) for module in beside for parameter in module.parameters()}
    return {
        names.get(name, name): parameter for name, parameter in model.named_parameters() if id(parameter) not in added
    }


def quantised_layers(model: nn.Module) -> dict[str, QuantisedLinear]:
    """Every layer with a weight in a storage of its own, by its path in the base, as if nothing were attached."""
    adapted = {path for path, module in model.named_modules() if isinstance(module, Adapted)}
    return {
        path.removesuffix(".base") if path.rpartition(".")[0] in adapted else path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, QuantisedLinear)
    }


def adapt(base: nn.Module, site: Site) -> Adapted:
    """The adapted form of a base layer, without any delta yet."""
    return (AdaptedEmbedding if site.embedding else AdaptedLinear)(base, site).train(base.training)
