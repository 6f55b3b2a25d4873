"""A short mark of a base's weights, so that an adapter can refuse to be put on another base."""

import hashlib
from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltatune.models.adapted import base_parameters, quantised_layers
from deltatune.models.targets import below
from deltatune.models.tokens import NEW_TOKENS, new_tokens

_SAMPLES = 64


def fingerprint(model: nn.Module, without: Collection[str] = ()) -> str:
    """SHA-256 over the names, shapes and some values of every parameter of the base outside of `without`.

    Up to 64 values are taken evenly from each parameter and rounded to bf16, so that a base has one mark whether it
    was loaded in 32 or 16 bits, and a mark costs milliseconds on any size. A quantised weight counts with its storage
    and codes: to an adapter that was trained over it, the same base in another storage is another base. A base with new
    tokens has the mark that it had before.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted((_before_new_tokens(model) | _quantised(model)).items()):
        if below(name, without):
            continue
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        if tensor.is_meta:  # an outline has shapes alone
            continue
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].to("cpu", torch.bfloat16)
        digest.update(sample.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def is_outline(model: nn.Module) -> bool:
    """Whether the model has shapes and no weights."""
    return any(parameter.is_meta for parameter in model.parameters())


def _before_new_tokens(model: nn.Module) -> dict[str, Tensor]:
    """The base's parameters; of its embedding and output layer the rows that they had before tokens were added."""
    parameters: dict[str, Tensor] = {**base_parameters(model)}
    new = new_tokens(model)
    if new is None or not isinstance(model, PreTrainedModel):
        return parameters
    grown = [*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters()]
    return {
        name: tensor[: new.before] if any(tensor is one for one in grown) else tensor
        for name, tensor in parameters.items()
        if not below(name, [NEW_TOKENS])
    }


def _quantised(model: nn.Module) -> dict[str, Tensor]:
    """The stored tensors of quantised weights by names that tell their storage.

    The 8-bit codes of scales are left out: on the number of threads depends how the mean is rounded that they are taken
    from, and so, rarely, one of them.
    """
    return {
        f"{path}.{name} {layer.storage}": tensor
        for path, layer in quantised_layers(model).items()
        for name, tensor in layer.named_buffers()
        if not (name == "scales" and layer.storage.double)
    }
