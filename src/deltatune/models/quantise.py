"""Which linear layers of a base are stored how: what was asked for, by target, and what stands in the model."""

from collections.abc import Mapping
from typing import Any, cast

import torch
import yaml
from torch import nn
from transformers import PreTrainedModel

from deltatune.errors import UserError
from deltatune.models.adapted import Adapted, quantised_layers
from deltatune.models.attach import Model, attachments, find_head
from deltatune.models.targets import ALL, adaptable, match
from deltatune.weights import QuantisedLinear, Storage, parse_storage

Storages = str | Mapping[str, str]
"""A storage for all linear layers, such as `nf4`, or one for each of several targets: `{mlp: nf4, attention: int8}`."""

METHOD = "deltatune"
"""What a saved model's configuration calls the way in which it is quantised."""


def read_storages(given: Storages) -> dict[str, str]:
    """Target → words of its storage, every option written out; empty for an empty text or mapping.

    Text in braces is read as a YAML mapping. Raises `UserError` for what is no storage.
    """
    if isinstance(given, str) and given.strip().startswith("{"):
        try:
            given = yaml.safe_load(given)
        except yaml.YAMLError as error:
            raise UserError(f"'{given}' is no mapping", "write it as {mlp: nf4, attention: int8}") from error
    by_target = {ALL: given} if isinstance(given, str) and given else given or {}
    if not (isinstance(by_target, Mapping) and all(isinstance(words, str) for words in by_target.values())):
        raise UserError(f"{given!r} is no storage", "write nf4, or a mapping such as {mlp: nf4, attention: int8}")
    return {str(target): str(parse_storage(words)) for target, words in by_target.items()}


def place_storages(model: nn.Module, storages: Mapping[str, str]) -> dict[str, Storage]:
    """The storage of each layer by path, later targets winning; the head and the output embedding have none.

    Raises `UserError` for a target that matches nothing.
    """
    roles = adaptable(model, find_head(model))
    return {
        path: parse_storage(words) for target, words in storages.items() for path in match(model, roles, target).paths
    }


def quantise(model: Model, storages: Storages) -> Model:
    """Stores the linear layers of a model so, in place, and returns it. Embeddings, norms and the head are left alone.

    `deltatune.load(…, storage=…)` does the same layer by layer while it reads. Raises `UserError` for a storage or
    target that does not exist, a model that has adapters or is quantised, and a weight that is not finite.
    """
    asked = read_storages(storages)
    if attachments(model):
        raise UserError("an adapter is attached to this model", "quantise it first, then attach")
    if quantised_layers(model):
        raise UserError("this model is quantised already", "load it again in another storage")
    for path, storage in place_storages(model, asked).items():
        layer = model.get_submodule(path)
        try:
            model.set_submodule(path, QuantisedLinear.of(layer, storage))
        except UserError as error:
            raise UserError(f"{path}: {error.message}", error.hint) from error
    note_storages(model, asked)
    return model


@torch.no_grad()
def dequantise(model: Model) -> Model:
    """Makes every quantised layer of a model an ordinary one with its decoded weight, in place."""
    for path, layer in quantised_layers(model).items():
        inside = isinstance(model.get_submodule(path), Adapted)
        plain = layer.dense_layer().requires_grad_(not attachments(model))
        model.set_submodule(f"{path}.base" if inside else path, plain)
    note_storages(model, {})
    return model


def storages_of(model: nn.Module) -> dict[str, str]:
    """Target → words of its storage, as given when the model was loaded or quantised; empty for a plain one."""
    return dict((_noted(model) or {}).get("storages", {}))


def note_storages(model: nn.Module, storages: Mapping[str, str]) -> None:
    """Writes into the model's configuration how its layers are stored, so that a saved model can be loaded again."""
    config = getattr(model, "config", None)
    layers: dict[str, list[str]] = {}
    for path, layer in quantised_layers(model).items():
        layers.setdefault(str(layer.storage), []).append(path)
    if layers and config is not None:
        config.quantization_config = {"quant_method": METHOD, "storages": dict(storages), "layers": layers}
    elif _noted(model) is not None:
        del cast(PreTrainedModel, model).config.quantization_config


def total_parameters(model: nn.Module) -> int:
    """All parameters of a model, the numbers of quantised weights among them."""
    packed = sum(layer.in_features * layer.out_features for layer in quantised_layers(model).values())
    return packed + sum(parameter.numel() for parameter in model.parameters())


def _noted(model: nn.Module) -> dict[str, Any] | None:
    noted = getattr(getattr(model, "config", None), "quantization_config", None)
    return noted if isinstance(noted, dict) and noted.get("quant_method") == METHOD else None
