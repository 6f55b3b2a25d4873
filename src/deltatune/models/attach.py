"""Putting a method on a model: what it targets is wrapped, what it trains is thawed, everything else is frozen.

The model stays an ordinary `nn.Module` of its own class, so any training loop works with it.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from deltatune.errors import UserError
from deltatune.methods import Method, Selection, WeightDelta
from deltatune.models.adapted import AdaptedLinear
from deltatune.models.fingerprint import fingerprint
from deltatune.models.roles import Role
from deltatune.models.targets import Matched, adaptable, below, match
from deltatune.weights import weight_of

log = logging.getLogger("deltatune")
Model = TypeVar("Model", bound=nn.Module)

_HEAD_NAMES = ("classifier", "score", "classification_head", "pre_classifier")


@dataclass(frozen=True)
class Attachment:
    """What `attach` did; stands on the model as `model.attachment`."""

    method: Method
    head: tuple[str, ...]
    """Paths of the modules that make the head; they train with every method."""
    fingerprint: str
    """Of the base's weights before training, the head left out: an adapter belongs to one base."""
    matched: Matched = field(default_factory=lambda: Matched({}))
    modules: Mapping[str, WeightDelta] = field(default_factory=dict)
    """The method of each adapted layer by path: its own hyperparameters where a pattern gives it some."""


def attach(model: Model, method: Method, *, head: tuple[str, ...] | None = None, seed: int = 0) -> Model:
    """Attaches `method` to `model` in place and returns the model.

    `head` names the modules that train besides; left out, they are found (`find_head`). `seed` decides the
    initial values of what is added. Raises `UserError` for targets that match nothing, for hyperparameters that do
    not fit a layer, and for a model that has a method already.
    """
    if attachment(model) is not None:
        raise UserError("this model has a method attached already", "load the base again to attach another")
    head = find_head(model) if head is None else head
    mark = fingerprint(model, without=head)
    if isinstance(method, WeightDelta):
        done = _attach_deltas(model, method, head, mark, torch.Generator().manual_seed(seed))
    elif isinstance(method, Selection):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(below(name, head) or method.selects(name))
        done = Attachment(method, head, mark)
    else:
        raise UserError(f"{method!r} is no method", "use one such as deltatune.LoRA(rank=8)")
    model.attachment = done  # type: ignore[assignment]  # a plain object, not a parameter or module
    return model


def attachment(model: nn.Module) -> Attachment | None:
    """What was attached to the model; None for a plain one."""
    found = getattr(model, "attachment", None)
    return found if isinstance(found, Attachment) else None


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


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Every adapted layer by its path in the base."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; shared ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the adapted layers give the base's own output. (The trained head stays as it is.)"""
    layers = adapted_layers(model).values()
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def _attach_deltas(
    model: nn.Module, method: WeightDelta, head: tuple[str, ...], mark: str, generator: torch.Generator
) -> Attachment:
    roles = adaptable(model, head)
    matched = match(model, roles, method.targets)
    modules = _variants(model, method, {path: roles[path] for path in matched.paths})
    for path, variant in modules.items():  # refuse before anything is changed
        weight = weight_of(model.get_submodule(path))
        try:
            variant.check(weight.out, weight.in_)
        except UserError as error:
            raise UserError(f"{path}: {error.message}", error.hint) from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(below(name, head))
    for path, variant in modules.items():
        base = model.get_submodule(path)
        weight = weight_of(base)
        delta = variant.delta(weight.out, weight.in_, generator).to(next(base.parameters()).device)
        model.set_submodule(path, AdaptedLinear(base, delta).train(base.training))
    for line in str(matched).splitlines():
        log.info("%s: %s", method.name, line)
    return Attachment(method, head, mark, matched, modules)


def _variants(model: nn.Module, method: WeightDelta, roles: Mapping[str, Role]) -> dict[str, WeightDelta]:
    """The method of each path: with the values that its patterns give to it, later entries winning."""
    changes: dict[str, dict[str, object]] = {path: {} for path in roles}
    for pattern, hyperparameter in method.patterns.items():
        for entry, value in getattr(method, pattern).items():
            for path in match(model, roles, entry).paths:
                changes[path][hyperparameter] = value
    return {path: replace(method, **change) for path, change in changes.items()}  # type: ignore[type-var]
