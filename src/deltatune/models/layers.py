"""A method over layers on a model: which layers it adapts, its module over each, and what they share."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltatune.errors import UserError
from deltatune.methods import BlockInsert, Observer, OverLayers, Site
from deltatune.models.adapted import Adapted, AdaptedLinear, adapt, quantised_layers
from deltatune.models.observe import Examples, Originals, observe, observe_losses
from deltatune.models.part import Part
from deltatune.models.roles import Role, embedding_roles, linear_roles, survey
from deltatune.models.sublayers import beginnings, in_blocks
from deltatune.models.targets import Matched, adaptable, match
from deltatune.weights import is_transposed, weight_of

log = logging.getLogger("deltatune")

_SHARED = "base_model."


@dataclass(frozen=True)
class Placed:
    """Where a method would stand on a model, found from shapes alone."""

    matched: Matched
    modules: dict[str, OverLayers]
    """The method of each layer by path: its own hyperparameters where a pattern gives it some."""
    sites: dict[str, Site]


@dataclass(frozen=True, eq=False)
class Layers(Part):
    """The modules of one method over the layers it adapts."""

    method: OverLayers
    name: str
    """Of the adapter that it is part of."""
    matched: Matched
    modules: Mapping[str, OverLayers]
    """The method of each adapted layer by path: its own hyperparameters where a pattern gives it some."""
    layers: Mapping[str, Adapted]
    shared: nn.Module | None
    """What the method's modules have in common."""
    begins: Mapping[str, Adapted] = field(default_factory=dict)
    """The layers, by path, whose input the modules beside a sub-layer read."""
    trains_base: bool = False

    def __str__(self) -> str:
        return str(self.matched)

    @property
    def deltas(self) -> dict[str, nn.Module]:
        """The module over each layer, by path."""
        return {path: layer.deltas[self.name] for path, layer in self.layers.items()}

    def trained(self) -> list[nn.Parameter]:
        """The parameters of the modules, shared ones once."""
        return list(nn.ModuleList(self.deltas.values()).parameters())

    def claims(self) -> set[str]:
        """The weights of its layers, and the biases where its modules have their own."""
        biases = {f"{path}.bias": getattr(delta, "bias", None) for path, delta in self.deltas.items()}
        own = {name for name, bias in biases.items() if isinstance(bias, nn.Parameter)}
        return own | {f"{path}.weight" for path in self.layers}

    def switch(self, on: bool) -> None:
        """Makes its modules the layers' active ones, or none where they were."""
        for layer in (*self.layers.values(), *self.begins.values()):
            if on:
                layer.active = self.name
            elif layer.active == self.name:
                layer.active = None

    def remove(self, model: nn.Module) -> None:
        """Deletes the modules; a layer without any stands in the model again as it was."""
        self.switch(False)
        for path, layer in (*self.layers.items(), *self.begins.items()):
            layer.drop(self.name)
            if layer.idle:
                model.set_submodule(path, layer.base)

    def rates(self) -> dict[nn.Parameter, float]:
        """What the method says of parameters by their names within a delta."""
        factors: dict[nn.Parameter, float] = {}
        for path, delta in self.deltas.items():
            rates = self.modules[path].rates()
            factors |= {parameter: rates[name] for name, parameter in delta.named_parameters() if name in rates}
        return factors

    def penalty(self) -> Tensor | None:
        """The method's, such as AdaLoRA's."""
        return self.method.penalty(self.deltas)

    def after_step(self, step: int, steps: int) -> None:
        """Hands it to the method; AdaLoRA spends its budget here."""
        self.method.after_step(self.deltas, step, steps)

    def settled(self, step: int, steps: int) -> bool:
        """As the method says; AdaLoRA has more than its budget before."""
        return self.method.settled(step, steps)

    def stored(self) -> dict[str, Tensor]:
        """The method's tensors of each layer, and what they share."""
        tensors = {
            f"{path}.{suffix}": tensor
            for path, delta in self.deltas.items()
            for suffix, tensor in self.modules[path].stored(self.layers[path].site, delta).items()
        }
        shared = {} if self.shared is None else self.method.stored_shared(self.shared)
        return tensors | {f"{_SHARED}{suffix}": tensor for suffix, tensor in shared.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Hands each module its tensors and copies what is shared."""
        for path, delta in self.deltas.items():
            names = self.modules[path].stored(self.layers[path].site, delta)
            self.modules[path].restore(delta, {suffix: tensors[f"{path}.{suffix}"] for suffix in names})
        shared = {} if self.shared is None else self.method.stored_shared(self.shared)
        for suffix, tensor in shared.items():
            tensor.copy_(tensors[f"{_SHARED}{suffix}"])

    def to_peft(self, model: nn.Module) -> dict[str, Any]:
        """The fields of the method's file form, and the adapted layers by as short names as there are."""
        modules = {path: method.portable() for path, method in self.modules.items()}
        config = self.method.portable().to_peft(modules, self.deltas)
        config["target_modules"] = _short_names(model, list(self.layers))
        linear = [layer.base for layer in self.layers.values() if not layer.site.embedding]
        if linear and all(map(is_transposed, linear)):
            config["fan_in_fan_out"] = True  # not every config of PEFT's has the field
        return config


def place(model: nn.Module, method: OverLayers, head: tuple[str, ...]) -> Placed:
    """Finds the layers that `method` adapts, outside of `head`, and changes nothing.

    Raises `UserError` for targets that match nothing, and for hyperparameters that do not fit a layer, which it names.
    """
    roles = adaptable(model, head, embeddings=method.embeddings)
    matched = match(model, roles, method.targets)
    if isinstance(method, BlockInsert):
        matched = in_blocks(model, method, matched, roles)
    modules = _variants(model, method, {path: roles[path] for path in matched.paths})
    every = _sites(model)
    sites = {path: every[path] for path in modules}
    for path, variant in modules.items():
        try:
            variant.check(sites[path])
        except UserError as error:
            raise UserError(f"{path}: {error.message}", error.hint) from error
    return Placed(matched, modules, sites)


def put_layers(
    model: nn.Module,
    method: OverLayers,
    placed: Placed,
    name: str,
    head: tuple[str, ...],
    generator: torch.Generator,
    examples: Examples,
    originals: Originals | None,
) -> Layers:
    """Wraps the layers of `placed` and gives each its module, with first values from examples where it wants them."""
    observers = _observed(model, placed, examples, originals)
    if observers:
        method = method.informed(placed.modules, observers)
        placed = place(model, method, head)
    shared = method.share(list(placed.sites.values()), generator)
    layers, begins = {}, {}
    for path, variant in placed.modules.items():
        layer = layers[path] = _wrapped(model, path, placed.sites[path])
        delta = variant.delta(layer.site, layer.frozen, shared, generator).to(layer.weight.device)
        if path in observers:
            variant.begin(delta, observers.pop(path))  # what it saw can be as large as the weight
        layer.add(name, delta)
        if isinstance(variant, BlockInsert) and variant.beside:
            begin = layer.site.begin
            begins[begin] = _wrapped(model, begin, _sites(model)[begin])
            begins[begin].shows[name] = cast(AdaptedLinear, layer)
    for line in str(placed.matched).splitlines():
        log.info("%s: %s", method.name, line)
    return Layers(method, name, placed.matched, placed.modules, layers, shared, begins)


def _observed(model: nn.Module, placed: Placed, examples: Examples, originals: Originals | None) -> dict[str, Observer]:
    """The observers of a method, by path, that saw what they want; none where it has none, or the model no weights."""
    wanted = {path: variant.observer(placed.sites[path]) for path, variant in placed.modules.items()}
    observers = {path: observer for path, observer in wanted.items() if observer is not None}
    losses = {path: observer for path, observer in observers.items() if observer.of == "losses"}
    name = next(iter(placed.modules.values())).name
    for path in sorted(losses.keys() - quantised_layers(model).keys()):
        raise UserError(
            f"{name} begins with what storing weights in fewer bits lost, and {path} is stored as it is",
            "load the base with a storage such as nf4, or choose another init",
        )
    if not observers or any(parameter.is_meta for parameter in model.parameters()):
        return {}
    if losses:
        if originals is not None:
            observe_losses(model, losses, originals)
        if not all(observer.done for observer in losses.values()):
            raise UserError(
                f"{name} begins with what storing weights in fewer bits lost, and there are no weights as they were",
                "give attach originals=deltatune.originals(base), of a base whose files hold them; tune does so itself",
            )
    seeing = {path: observer for path, observer in observers.items() if path not in losses}
    if seeing and not observe(model, seeing, examples):
        raise UserError(
            f"{name} takes its first values from examples here, and there are none",
            "give some batches: attach(model, method, examples=batches); deltatune.tune does so itself",
        )
    return observers


def _wrapped(model: nn.Module, path: str, site: Site) -> Adapted:
    """The layer at `path` in its adapted form, put into the model where it was not yet."""
    layer = model.get_submodule(path)
    if not isinstance(layer, Adapted):
        layer = adapt(layer, site)
        model.set_submodule(path, layer)
    return layer


@survey
def _sites(model: nn.Module) -> dict[str, Site]:
    """Every linear layer and embedding of the base, by path."""
    layers, roles = dict(model.named_modules()), {**linear_roles(model), **embedding_roles(model)}
    begins = beginnings(roles)
    return {path: _site(layers, path, role, begins.get(path, "")) for path, role in roles.items()}


def _site(layers: Mapping[str, nn.Module], path: str, role: Role, begin: str) -> Site:
    layer = layers[path]
    if isinstance(layer, Adapted):
        return layer.site
    weight, has_bias = weight_of(layer), getattr(layer, "bias", None) is not None
    if begin and _inputs(layers[begin]) != weight.out:  # what goes in and what comes out are of one width
        begin = ""
    return Site(weight.out, weight.in_, path, role, has_bias, isinstance(layer, nn.Embedding), begin)


def _inputs(layer: nn.Module) -> int:
    return (layer.frozen if isinstance(layer, Adapted) else weight_of(layer)).in_


def _variants(model: nn.Module, method: OverLayers, roles: Mapping[str, Role]) -> dict[str, OverLayers]:
    """The method of each path: with the values that its patterns give to it, later entries winning."""
    changes: dict[str, dict[str, object]] = {path: {} for path in roles}
    for pattern, hyperparameter in method.patterns.items():
        for entry, value in getattr(method, pattern).items():
            for path in match(model, roles, entry).paths:
                changes[path][hyperparameter] = value
    return {
        path: cast(OverLayers, replace(cast(Any, method), **change)) if change else method
        for path, change in changes.items()
    }


def _short_names(model: nn.Module, paths: list[str]) -> list[str]:
    """The ends of the paths where these name no other layer, else the whole paths."""
    every = (*linear_roles(model), *embedding_roles(model))
    ends = {path.rpartition(".")[2] for path in paths}
    named = [path for path in every if path.rpartition(".")[2] in ends]
    return sorted(ends) if set(named) == set(paths) else sorted(paths)
