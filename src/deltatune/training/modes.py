"""Scoring a model in the midst of its training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

SCORED_TOKENS = 4096
"""Tokens in a batch that is only scored."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block nothing is recorded for backward and dropout is off; each module goes back to its own mode."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, was in training.items():
            module.training = was
