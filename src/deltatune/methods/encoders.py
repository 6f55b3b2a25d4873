"""What the encoders of soft prompts share: first values from a given generator, and computing in their own type."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer with PyTorch's first values, U(±1/√inputs), from `generator`."""
    return drawn(nn.Linear(inputs, outputs), 1 / math.sqrt(inputs), generator)


@torch.no_grad()
def drawn(module: Module, bound: float, generator: torch.Generator) -> Module:
    """The module with every parameter uniform in ±bound, from `generator`."""
    for parameter in module.parameters():
        parameter.uniform_(-bound, bound, generator=generator)
    return module


@contextmanager
def own_type(tensor: Tensor) -> Iterator[None]:
    """Within the block the parameters' own type is computed with, under autocast too: an encoder is small."""
    with torch.autocast(tensor.device.type, enabled=False):
        yield
