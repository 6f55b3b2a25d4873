"""Merging what was trained into the base's weights, and taking it out again to the same bits."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltatune.errors import UserError
from deltatune.models.attach import Model, adapted_layers, attachment
from deltatune.models.quantise import note_storages, storages_of
from deltatune.models.tokens import settle

log = logging.getLogger("deltatune")


@dataclass(frozen=True)
class Merged:
    """What merging did."""

    layers: int
    """Weights that were replaced by their merged ones."""
    difference: float | None
    """The largest difference of any output on the probe, merged against adapted; None without a probe."""
    largest: float | None
    """The largest output on the probe in size, as adapted; None without a probe."""


def merge(model: nn.Module, probe: Mapping[str, Tensor] | None = None) -> Merged:
    """Writes the merged weight of every adapted layer over the base's, so that inference costs nothing more.

    `probe` is a batch of model inputs on which the merged model is held against the adapted one, in evaluation mode.
    `unmerge` restores the base's bits. Raises `UserError`, with the model unchanged, where the method cannot be
    merged, a merged weight is not finite, or a weight is tied to another layer that would change with it. A selection
    is in the weights already: nothing is to do.
    """
    done = attachment(model)
    if done is None:
        raise UserError("nothing is attached to this model, so there is nothing to merge")
    for part in done.parts:
        if why := getattr(part.method, "unmergeable", ""):
            raise UserError(f"{part.method.name} cannot be merged: {why}", "keep the adapter beside the base")
    _refuse_ties(model)
    before = None if probe is None else outputs(model, probe)
    layers = {path: layer for path, layer in adapted_layers(model).items() if layer.delta is not None}
    for path, layer in layers.items():
        try:
            layer.merge()
        except UserError as error:
            unmerge(model)
            raise UserError(f"{path}: {error.message}", error.hint) from error
    if probe is None or before is None:
        return Merged(len(layers), None, None)
    difference = (outputs(model, probe) - before).abs().max().item()
    log.info("merged %d layers; the largest difference of an output on the probe is %.2g", len(layers), difference)
    return Merged(len(layers), difference, before.abs().max().item())


def unmerge(model: Model) -> Model:
    """Puts back the base's weights as they were before `merge`, bit for bit."""
    for layer in adapted_layers(model).values():
        layer.unmerge()
    return model


def fold(model: Model, probe: Mapping[str, Tensor] | None = None) -> Model:
    """Merges for good: every adapted layer is replaced by its base layer with the merged weight, an ordinary module.

    Over a quantised weight that is an ordinary layer in the run's type; what is not adapted stays as it is stored. New
    tokens go into the vocabulary's own weights.
    Other adapters that were attached are gone. See `merge` for `probe` and for what is refused.
    """
    merge(model, probe)
    for path, layer in adapted_layers(model).items():
        model.set_submodule(path, layer.base)
    settle(model)
    del model.attachment, model.attachments, model.untrained_head
    note_storages(model, storages_of(model))
    return model.requires_grad_(True)


def _refuse_ties(model: nn.Module) -> None:
    adapted = {
        layer.weight.data_ptr(): path for path, layer in adapted_layers(model).items() if layer.delta is not None
    }
    for path, parameter in model.named_parameters(remove_duplicate=False):
        name = adapted.get(parameter.data_ptr())
        if name is not None and not path.startswith(f"{name}.base."):
            raise UserError(
                f"{name} cannot be merged: its weight is tied to {path}, which would change with it",
                "keep the adapter beside the base, or adapt other layers",
            )


@torch.no_grad()
def outputs(model: nn.Module, probe: Mapping[str, Tensor]) -> Tensor:
    """The logits of a batch of model inputs, in evaluation mode; the model is left in the mode it was in."""
    training = model.training
    try:
        logits: Tensor = model.eval()(**probe).logits
    finally:
        model.train(training)
    return logits
