"""Putting a method on a model: what it targets is wrapped, what it trains is thawed, everything else is frozen.

The model stays an ordinary `nn.Module` of its own class, so any training loop works with it.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltatune.errors import UserError, unknown
from deltatune.methods import Method, Mixed, OverLayers, Selection, SoftPrompt
from deltatune.models.adapted import Adapted
from deltatune.models.fingerprint import fingerprint, is_outline
from deltatune.models.layers import Layers, place, put_layers
from deltatune.models.observe import Examples, Originals
from deltatune.models.part import Part
from deltatune.models.prompts import put_prompt
from deltatune.models.selected import put_selection
from deltatune.models.targets import below
from deltatune.models.tokens import NEW_TOKENS

Model = TypeVar("Model", bound=nn.Module)

_HEAD_NAMES = ("classifier", "score", "classification_head", "pre_classifier", NEW_TOKENS)


@dataclass(frozen=True, eq=False)
class Attachment:
    """What `attach` did under one name; the active one stands on the model as `model.attachment`."""

    name: str
    method: Method
    head: tuple[str, ...]
    """Paths of the modules that make the head; they train with every method."""
    fingerprint: str
    """Of the base's weights before training, the head left out: an adapter belongs to one base."""
    parts: tuple[Part, ...]
    """What the method, or each of several methods that make one adapter, put on the model."""
    resting_head: dict[str, Tensor] = field(default_factory=dict)
    """The values of this adapter's head while another one is active."""

    @property
    def modules(self) -> dict[str, OverLayers]:
        """The method of each adapted layer by path."""
        over_layers = [part for part in self.parts if isinstance(part, Layers)]
        return {path: method for part in over_layers for path, method in part.modules.items()}

    @property
    def trains_base(self) -> bool:
        """Whether it writes to the base's own parameters."""
        return any(part.trains_base for part in self.parts)


def attach(
    model: Model,
    method: Method,
    *,
    name: str = "default",
    head: tuple[str, ...] | None = None,
    seed: int = 0,
    examples: Examples = (),
    originals: Originals | None = None,
) -> Model:
    """Attaches `method` to `model` in place under `name`, makes it the active one, and returns the model.

    `head` names the modules that train besides; left out, they are found (`find_head`). `seed` decides the
    initial values of what is added. A few methods take these from `examples`: batches of what the model is called with,
    labels included; the others do not read them. LoRA's loftq begins with the weights as they were before they were
    quantised: `originals` (see `deltatune.originals`) reads them again. Adapters can stand side by side; see
    `activate`. Raises `UserError` for targets that match nothing, hyperparameters that do not fit a layer, a name that
    is taken, examples or originals that are wanted and not given, and a method that changes the base's own parameters
    beside another one.
    """
    others, before = attachments(model), attachment(model)
    _check_name(name, method, others)
    _refuse_merged(model)
    head = find_head(model) if head is None else head
    if others:
        activate(model, None)  # what is marked and observed is the base, with its own head
    mark = fingerprint(model, without=head)
    generator = torch.Generator().manual_seed(seed)
    try:
        for one in parts_of(method):
            if isinstance(one, OverLayers) and not is_outline(model):  # which has shapes alone, and another mark
                one.check_base(mark)
        parts = _put_all(model, method, name, head, generator, examples, originals)
    except UserError:
        if before is not None:
            activate(model, before.name)
        raise
    method = Mixed(*(part.method for part in parts)) if isinstance(method, Mixed) else parts[0].method
    done = Attachment(name, method, head, mark, parts)
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
        _refuse_trained_base(before)
    if before is not None:
        before.resting_head.update(_copies(_head_parameters(model, before.head)))
    if chosen is not before:
        head = _untrained_head(model) | (chosen.resting_head if chosen else {})
        with torch.no_grad():
            for path, value in head.items():
                model.get_parameter(path).copy_(value)
        model.zero_grad()
    for done in every.values():
        for part in done.parts:
            part.switch(False)
    own: set[nn.Parameter] = set()
    for part in chosen.parts if chosen else ():
        part.switch(True)
        own.update(part.trained())
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(parameter in own or (chosen is not None and below(path, chosen.head)))
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
    _refuse_trained_base(every[name])
    if attachment(model) is every[name]:
        activate(model, None)
    for part in every.pop(name).parts:
        part.remove(model)
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
    unlike = [a.method.name for a in others.values() if a.trains_base]
    if unlike or (others and any(isinstance(one, Selection) for one in parts_of(method))):
        raise UserError(
            f"{[*unlike, method.name][0]} trains the base's own parameters, so nothing can stand beside it",
            "load the base again to attach another",
        )


def _refuse_merged(model: nn.Module) -> None:
    if any(layer.merged for layer in adapted_layers(model).values()):
        raise UserError("an adapter is merged into this model", "unmerge it first")


def _refuse_trained_base(done: Attachment) -> None:
    if done.trains_base:
        raise UserError(f"'{done.name}' trained the base's own parameters", "load the base again to be rid of it")


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
    """The learning rate of each parameter that trains, by name, as a multiple of the run's.

    The parts of a mix keep the ratio of their methods' own rates; the run's is the first one's.
    """
    factors: dict[nn.Parameter, float] = {}
    for part in (parts := _parts(model)):
        ratio = part.method.learning_rate / parts[0].method.learning_rate
        own = part.rates()
        factors |= {parameter: ratio * own.get(parameter, 1.0) for parameter in part.trained()}
    return {name: factors.get(parameter, 1.0) for name, parameter in trainable_parameters(model).items()}


def penalty(model: nn.Module) -> Tensor | None:
    """The term that the active method adds to the loss, such as AdaLoRA's; None where it adds none."""
    terms = [term for part in _parts(model) if (term := part.penalty()) is not None]
    return torch.stack(terms).sum() if terms else None


def after_step(model: nn.Module, step: int, steps: int) -> None:
    """Tells the active method that optimiser step number `step` (from 1) of `steps` is done.

    To be called before the gradients are cleared. Most methods need nothing of it; AdaLoRA spends its budget here.
    """
    for part in _parts(model):
        part.after_step(step, steps)


def settled(model: nn.Module, step: int, steps: int) -> bool:
    """Whether what trains has its final form after that step; AdaLoRA's has more than its budget before."""
    return all(part.settled(step, steps) for part in _parts(model))


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the adapted layers give the base's own output. (The trained head stays as it is.)

    Raises `UserError` while an adapter is merged.
    """
    _refuse_merged(model)
    parts = _parts(model)
    for part in parts:
        part.switch(False)
    try:
        yield
    finally:
        for part in parts:
            part.switch(True)


def _parts(model: nn.Module) -> tuple[Part, ...]:
    """The parts of the active adapter."""
    done = attachment(model)
    return done.parts if done else ()


def parts_of(method: Method) -> tuple[Method, ...]:
    """The methods of a mix; any other method alone."""
    return method.parts if isinstance(method, Mixed) else (method,)


def _put_all(
    model: nn.Module,
    method: Method,
    name: str,
    head: tuple[str, ...],
    generator: torch.Generator,
    examples: Examples,
    originals: Originals | None,
) -> tuple[Part, ...]:
    """Puts a method, or all those of a mix, on the model; what stands on it already goes again when one is refused."""
    parts: list[Part] = []
    try:
        for one in parts_of(method):
            parts.append(_put(model, one, name, head, generator, examples, originals))
            _refuse_shared(parts)
    except UserError:
        for part in parts:
            if not part.trains_base:
                part.remove(model)
        raise
    return tuple(parts)


def _refuse_shared(parts: list[Part]) -> None:
    """A parameter that the last part trains or stands over is no earlier part's."""
    *before, last = parts
    for other in before:
        if both := last.claims() & other.claims():
            raise UserError(
                f"{other.method.name} and {last.method.name} both change {min(both)}",
                "give one of them something else to train",
            )


def _refuse_twice(model: nn.Module, method: Method, paths: Iterable[str], name: str) -> None:
    for path in paths:
        layer = model.get_submodule(path)
        if isinstance(layer, Adapted) and name in layer.deltas:
            raise UserError(
                f"{method.name} adapts {path}, and so does another part of the mix",
                "give one of them other targets",
            )


def _put(
    model: nn.Module,
    method: Method,
    name: str,
    head: tuple[str, ...],
    generator: torch.Generator,
    examples: Examples,
    originals: Originals | None,
) -> Part:
    """Puts one method on the model; refuses before anything is changed."""
    if isinstance(method, OverLayers):
        placed = place(model, method, head)
        _refuse_overlap(name, head, placed.modules, attachments(model))
        _refuse_twice(model, method, placed.modules, name)
        return put_layers(model, method, placed, name, head, generator, examples, originals)
    if isinstance(method, SoftPrompt):
        return put_prompt(model, method, name, head, generator)
    if isinstance(method, Selection):
        return put_selection(model, method, head)
    raise UserError(f"{method!r} is no method", "use one such as deltatune.LoRA(rank=8)")
