"""Putting a method on a model: what it targets is wrapped, what it trains is thawed, everything else is frozen.

The model stays an ordinary `nn.Module` of its own class, so any training loop works with it.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltatune.errors import UserError, unknown
from deltatune.methods import Method, Observer, Selection, Site, WeightDelta
from deltatune.models.adapted import Adapted, adapt, quantised_layers
from deltatune.models.fingerprint import fingerprint
from deltatune.models.observe import Examples, observe
from deltatune.models.roles import Role
from deltatune.models.targets import Matched, adaptable, below, match
from deltatune.weights import weight_of

log = logging.getLogger("deltatune")
Model = TypeVar("Model", bound=nn.Module)

_HEAD_NAMES = ("classifier", "score", "classification_head", "pre_classifier")


@dataclass(frozen=True)
class Attachment:
    """What `attach` did under one name; the active one stands on the model as `model.attachment`."""

    name: str
    method: Method
    head: tuple[str, ...]
    """Paths of the modules that make the head; they train with every method."""
    fingerprint: str
    """Of the base's weights before training, the head left out: an adapter belongs to one base."""
    matched: Matched = field(default_factory=lambda: Matched({}))
    modules: Mapping[str, WeightDelta] = field(default_factory=dict)
    """The method of each adapted layer by path: its own hyperparameters where a pattern gives it some."""
    shared: nn.Module | None = None
    """What the method's deltas have in common."""
    resting_head: dict[str, Tensor] = field(default_factory=dict)
    """The values of this adapter's head while another one is active."""


@dataclass(frozen=True)
class Placed:
    """Where a method would stand on a model, found from shapes alone."""

    matched: Matched
    modules: dict[str, WeightDelta]
    """The method of each layer by path: its own hyperparameters where a pattern gives it some."""
    sites: dict[str, Site]


def place(model: nn.Module, method: WeightDelta, head: tuple[str, ...]) -> Placed:
    """Finds the layers that `method` adapts, outside of `head`, and changes nothing.

    Raises `UserError` for targets that match nothing, and for hyperparameters that do not fit a layer, which it names.
    """
    roles = adaptable(model, head, embeddings=method.embeddings)
    matched = match(model, roles, method.targets)
    modules = _variants(model, method, {path: roles[path] for path in matched.paths})
    sites = {path: _site(model, path, roles[path]) for path in modules}
    for path, variant in modules.items():
        try:
            variant.check(sites[path])
        except UserError as error:
            raise UserError(f"{path}: {error.message}", error.hint) from error
    return Placed(matched, modules, sites)


def attach(
    model: Model,
    method: Method,
    *,
    name: str = "default",
    head: tuple[str, ...] | None = None,
    seed: int = 0,
    examples: Examples = (),
) -> Model:
    """Attaches `method` to `model` in place under `name`, makes it the active one, and returns the model.

    `head` names the modules that train besides; left out, they are found (`find_head`). `seed` decides the
    initial values of what is added. A few methods take these from `examples`: batches of what the model is called with,
    labels included; the others do not read them. Methods that add weight deltas can stand side by side; see `activate`.
    Raises `UserError` for targets that match nothing, hyperparameters that do not fit a layer, a name that is taken,
    examples that are wanted and not given, and a method that changes the base's own parameters beside another one.
    """
    others = attachments(model)
    _check_name(name, method, others)
    _refuse_merged(model)
    head = find_head(model) if head is None else head
    if isinstance(method, WeightDelta):
        done = _attach_deltas(model, method, name, head, torch.Generator().manual_seed(seed), examples)
    elif isinstance(method, Selection):
        _refuse_quantised(model, method)
        done = Attachment(name, method, head, fingerprint(model, without=head))
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(below(path, head) or method.selects(path))
    else:
        raise UserError(f"{method!r} is no method", "use one such as deltatune.LoRA(rank=8)")
    # Plain objects on the model, not parameters or modules.
    model.untrained_head = _copies(_head_parameters(model, head)) | _untrained_head(model)  # type: ignore[assignment]
    model.attachments = {**others, name: done}  # type: ignore[assignment]
    return activate(model, name)


def activate(model: Model, name: str | None) -> Model:
    """Makes the adapter of that name the one that acts and trains, its head included; None: the base with its own head.

    Gradients that stand are the other adapter's and are cleared. Raises `UserError` for an unknown name, while an
    adapter is merged, and for None where a method trained the base itself.
    """
    every = attachments(model)
    if name is not None and name not in every:
        raise unknown("adapter", name, every)
    _refuse_merged(model)
    before, chosen = attachment(model), every.get(name or "")
    if before is not None and chosen is None:
        _refuse_selection(before)
    if before is not None:
        before.resting_head.update(_copies(_head_parameters(model, before.head)))
    if chosen is not before:
        head = _untrained_head(model) | (chosen.resting_head if chosen else {})
        with torch.no_grad():
            for path, value in head.items():
                model.get_parameter(path).copy_(value)
        model.zero_grad()
    for layer in adapted_layers(model).values():
        layer.active = name
    if chosen is None or isinstance(chosen.method, WeightDelta):
        own = {id(parameter) for delta in _deltas(model).values() for parameter in delta.parameters()}
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(id(parameter) in own or (chosen is not None and below(path, chosen.head)))
    model.attachment = chosen  # type: ignore[assignment]
    return model


def detach(model: Model, name: str = "default") -> Model:
    """Deletes the adapter of that name with its head; without any adapter left, the model is the base again.

    Raises `UserError` for an unknown name, while an adapter is merged, and for a method that trained the base itself.
    """
    every = attachments(model)
    if name not in every:
        raise unknown("adapter", name, every)
    _refuse_merged(model)
    _refuse_selection(every[name])
    if attachment(model) is every[name]:
        activate(model, None)
    del every[name]
    for path, layer in adapted_layers(model).items():
        if name in layer.deltas:
            del layer.deltas[name]
        if not layer.deltas:
            model.set_submodule(path, layer.base)
    if not every:
        del model.attachment, model.attachments, model.untrained_head
        model.requires_grad_(True)
    return model


def attachment(model: nn.Module) -> Attachment | None:
    """The active attachment of the model; None for a plain one."""
    found = getattr(model, "attachment", None)
    return found if isinstance(found, Attachment) else None


def attachments(model: nn.Module) -> dict[str, Attachment]:
    """Everything that is attached to the model, by name."""
    return cast(dict[str, Attachment], getattr(model, "attachments", {}))


def _check_name(name: str, method: Method, others: Mapping[str, Attachment]) -> None:
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"'{name}' cannot be an adapter's name", "use letters, digits, _ and -")
    if name in others:
        raise UserError(
            f"an adapter named '{name}' is attached already", "give another name, or delete that one with detach"
        )
    unlike = [a.method.name for a in others.values() if not isinstance(a.method, WeightDelta)]
    if unlike or (others and not isinstance(method, WeightDelta)):
        raise UserError(
            f"{[*unlike, method.name][0]} trains the base's own parameters, so nothing can stand beside it",
            "load the base again to attach another",
        )


def _refuse_merged(model: nn.Module) -> None:
    if any(layer.merged for layer in adapted_layers(model).values()):
        raise UserError("an adapter is merged into this model", "unmerge it first")


def _refuse_selection(done: Attachment) -> None:
    if not isinstance(done.method, WeightDelta):
        raise UserError(f"'{done.name}' trained the base's own parameters", "load the base again to be rid of it")


def _refuse_quantised(model: nn.Module, method: Selection) -> None:
    """A weight that is stored in codes cannot train."""
    for path, layer in quantised_layers(model).items():
        if method.selects(f"{path}.weight"):
            raise UserError(
                f"{method.name} trains {path}.weight, which is stored as {layer.storage} and stays as it is",
                "load the base without a storage, or use a method that adds to frozen weights, such as lora",
            )


def _refuse_overlap(name: str, head: tuple[str, ...], paths: Iterable[str], others: Mapping[str, Attachment]) -> None:
    """A layer cannot be in the head of one adapter, which is swapped as a whole, and carry a delta of another."""
    for other in others.values():
        pairs = ((name, paths, other.name, other.head), (other.name, other.modules, name, head))
        for adapting, adapted, owning, owned in pairs:
            for path in adapted:
                if below(path, owned):
                    raise UserError(
                        f"'{adapting}' adapts {path}, which is in the head of '{owning}'",
                        "give both the same head, or attach them to two models",
                    )


def _untrained_head(model: nn.Module) -> dict[str, Tensor]:
    return cast(dict[str, Tensor], getattr(model, "untrained_head", {}))


def _head_parameters(model: nn.Module, head: tuple[str, ...]) -> dict[str, nn.Parameter]:
    return {path: parameter for path, parameter in model.named_parameters() if below(path, head)}


def _copies(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {path: parameter.detach().clone() for path, parameter in parameters.items()}


def find_head(model: nn.Module) -> tuple[str, ...]:
    """The modules that a task adds to a base: outside of the base model, or initialised when it was loaded."""
    inside = getattr(model, "base_model_prefix", "")
    if inside and hasattr(model, inside):
        vocabulary = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        children = (
            (name, child) for name, child in model.named_children() if name != inside and child is not vocabulary
        )
        outer = [name for name, child in children if list(child.parameters())]
    else:
        outer = [name for name, _ in model.named_children() if name in _HEAD_NAMES]
    fresh = [path for path in getattr(model, "newly_initialised", ()) if not below(path, outer)]
    return (*outer, *fresh)


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """Every adapted layer by its path in the base."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Adapted)}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; shared ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def learning_rates(model: nn.Module) -> dict[str, float]:
    """The learning rate of each parameter that trains, by name, as a multiple of the run's."""
    done = attachment(model)
    factors: dict[int, float] = {}
    if done is not None and isinstance(done.method, WeightDelta):
        for path, delta in _deltas(model).items():
            rates = done.modules[path].rates()
            factors |= {id(parameter): rates.get(name, 1.0) for name, parameter in delta.named_parameters()}
    return {name: factors.get(id(parameter), 1.0) for name, parameter in trainable_parameters(model).items()}


def penalty(model: nn.Module) -> Tensor | None:
    """The term that the active method adds to the loss, such as AdaLoRA's; None where it adds none."""
    done = attachment(model)
    return done.method.penalty(_deltas(model)) if done and isinstance(done.method, WeightDelta) else None


def after_step(model: nn.Module, step: int, steps: int) -> None:
    """Tells the active method that optimiser step number `step` (from 1) of `steps` is done.

    To be called before the gradients are cleared. Most methods need nothing of it; AdaLoRA spends its budget here.
    """
    done = attachment(model)
    if done and isinstance(done.method, WeightDelta):
        done.method.after_step(_deltas(model), step, steps)


def settled(model: nn.Module, step: int, steps: int) -> bool:
    """Whether what trains has its final form after that step; AdaLoRA's has more than its budget before."""
    done = attachment(model)
    return not (done and isinstance(done.method, WeightDelta)) or done.method.settled(step, steps)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the adapted layers give the base's own output. (The trained head stays as it is.)

    Raises `UserError` while an adapter is merged.
    """
    _refuse_merged(model)
    layers = adapted_layers(model).values()
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def _deltas(model: nn.Module) -> dict[str, nn.Module]:
    """The active delta of each layer that has one."""
    return {path: layer.delta for path, layer in adapted_layers(model).items() if layer.delta is not None}


def _attach_deltas(
    model: nn.Module,
    method: WeightDelta,
    name: str,
    head: tuple[str, ...],
    generator: torch.Generator,
    examples: Examples,
) -> Attachment:
    placed = place(model, method, head)  # refuses before anything is changed
    others, before = attachments(model), attachment(model)
    _refuse_overlap(name, head, placed.modules, others)
    if others:
        activate(model, None)  # what is marked and observed is the base, with its own head
    mark = fingerprint(model, without=head)
    try:
        observers = _observed(model, placed, examples)
        if observers:
            method = method.informed(placed.modules, observers)
            placed = place(model, method, head)
    except UserError:
        if before is not None:
            activate(model, before.name)
        raise
    shared = method.share(list(placed.sites.values()), generator)
    for path, variant in placed.modules.items():
        layer = model.get_submodule(path)
        layer = layer if isinstance(layer, Adapted) else adapt(layer, placed.sites[path])
        delta = variant.delta(layer.site, layer.frozen, shared, generator).to(layer.weight.device)
        if path in observers:
            variant.begin(delta, observers.pop(path))  # what it saw can be as large as the weight
        layer.add(name, delta)
        model.set_submodule(path, layer)
    for line in str(placed.matched).splitlines():
        log.info("%s: %s", method.name, line)
    return Attachment(name, method, head, mark, placed.matched, placed.modules, shared)


def _observed(model: nn.Module, placed: Placed, examples: Examples) -> dict[str, Observer]:
    """The observers of a method, by path, that saw the examples; none where it has none, or the model no weights."""
    wanted = {path: variant.observer(placed.sites[path]) for path, variant in placed.modules.items()}
    observers = {path: observer for path, observer in wanted.items() if observer is not None}
    if not observers or any(parameter.is_meta for parameter in model.parameters()):
        return {}
    if not observe(model, observers, examples):
        raise UserError(
            f"{next(iter(placed.modules.values())).name} takes its first values from examples here, and there are none",
            "give some batches: attach(model, method, examples=batches); deltatune.tune does so itself",
        )
    return observers


def _site(model: nn.Module, path: str, role: Role) -> Site:
    layer = model.get_submodule(path)
    if isinstance(layer, Adapted):
        return layer.site
    weight = weight_of(layer)
    has_bias = getattr(layer, "bias", None) is not None
    return Site(weight.out, weight.in_, path, role, has_bias, isinstance(layer, nn.Embedding))


def _variants(model: nn.Module, method: WeightDelta, roles: Mapping[str, Role]) -> dict[str, WeightDelta]:
    """The method of each path: with the values that its patterns give to it, later entries winning."""
    changes: dict[str, dict[str, object]] = {path: {} for path in roles}
    for pattern, hyperparameter in method.patterns.items():
        for entry, value in getattr(method, pattern).items():
            for path in match(model, roles, entry).paths:
                changes[path][hyperparameter] = value
    return {path: replace(method, **change) for path, change in changes.items()}  # type: ignore[type-var]
