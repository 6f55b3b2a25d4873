"""Showing examples to a method before it is attached: the inputs of each site, or the loss's gradient by its weight."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltatune.errors import UserError
from deltatune.methods import Observer
from deltatune.models.adapted import Adapted
from deltatune.weights import weight_of

Examples = Iterable[Mapping[str, Tensor]]
"""Batches of what the model takes; with labels where a method looks at gradients."""

Originals = Callable[[Callable[[str, Tensor], None]], None]
"""Calls back with the path of each quantised layer and its weight (out, in) as it was before, one after the other."""


def observe(model: nn.Module, observers: Mapping[str, Observer], examples: Examples) -> int:
    """Runs batches through the model until every observer, by module path, has seen enough; gives how many there were.

    The model is in evaluation mode meanwhile. A gradient by a weight is formed inside the backward pass, given to its
    observer and forgotten, so that those of all layers never stand side by side.
    """
    device = next(model.parameters()).device
    backward = any(observer.of == "gradients" for observer in observers.values())
    current: dict[str, Tensor] = {}
    batches = 0
    with _frozen(model), ExitStack() as hooks, torch.set_grad_enabled(backward):
        for path, observer in observers.items():
            layer = model.get_submodule(path)
            watch = (
                _watch_inputs(layer, observer, current) if observer.of == "inputs" else _watch_gradient(layer, observer)
            )
            for handle in watch:
                hooks.callback(handle.remove)
        for batch in examples:
            current.clear()
            current.update({name: tensor.to(device) for name, tensor in batch.items()})
            output = model(**current)
            if backward:
                _loss(output).backward()  # type: ignore[no-untyped-call]
            batches += 1
            if all(observer.done for observer in observers.values()):
                break
    return batches


def observe_losses(model: nn.Module, observers: Mapping[str, Observer], originals: Originals) -> None:
    """Shows each observer, by module path, what storing the weight there lost."""

    def see(path: str, weight: Float[Tensor, "out in"]) -> None:
        if path in observers:
            layer = model.get_submodule(path)
            frozen = layer.frozen if isinstance(layer, Adapted) else weight_of(layer)
            stored = frozen.dense()
            observers[path].see(weight.to(stored.device, torch.float32) - stored.float())

    with torch.no_grad():
        originals(see)


def _watch_inputs(layer: nn.Module, observer: Observer, batch: Mapping[str, Tensor]) -> tuple[RemovableHandle, ...]:
    def see(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not observer.done:
            observer.see(_vectors(inputs[0], batch.get("attention_mask")))

    return (layer.register_forward_pre_hook(see),)


def _watch_gradient(layer: nn.Module, observer: Observer) -> tuple[RemovableHandle, ...]:
    """Of y = x·Wᵀ the gradient by W is dyᵀ·x, whatever way W is stored; nothing else needs to be differentiable."""

    def start(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = inputs
        return (x if x.requires_grad else x.detach().requires_grad_(), *others)

    def follow(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        x = _vectors(inputs[0].detach())

        def see(dy: Tensor) -> None:
            observer.see(_vectors(dy).float().T @ x.float())

        output.register_hook(see)  # type: ignore[no-untyped-call]

    return layer.register_forward_pre_hook(start), layer.register_forward_hook(follow)


def _vectors(
    x: Float[Tensor, "*leading features"], mask: Int[Tensor, "examples length"] | None = None
) -> Float[Tensor, "vectors features"]:
    """The vectors of all tokens that are not padding; all of them where x has none for each token."""
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask.bool()]
    return x.reshape(-1, x.shape[-1])


def _loss(output: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise UserError(
            "the method reads the gradient of the loss, and the model gives none", "give examples with their labels"
        )
    return loss


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode and no parameter gets a gradient."""
    training = {module: module.training for module in model.modules()}
    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was
        for parameter, was in trains.items():
            parameter.requires_grad_(was)
