"""A short mark of a base's weights, so that an adapter can refuse to be put on another base."""

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

from deltatune.models.adapted import base_parameters
from deltatune.models.targets import below

_SAMPLES = 64


def fingerprint(model: nn.Module, without: Iterable[str] = ()) -> str:
    """SHA-256 over the names, shapes and some values of every parameter of the base outside of `without`.

    Up to 64 values are taken evenly from each parameter and rounded to bf16, so that a base has one mark whether it
    was loaded in 32 or 16 bits, and a mark costs milliseconds on any size.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(base_parameters(model).items()):
        if below(name, without):
            continue
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        if parameter.is_meta:  # an outline has shapes alone
            continue
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].to("cpu", torch.bfloat16)
        digest.update(sample.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
