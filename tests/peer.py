"""PEFT as a peer: adapters that it made itself."""

from pathlib import Path

import peft
import torch

from conformance.cases import shaken
from tiny import tiny_inputs, tiny_model


def peft_adapter(folder: Path, architecture: str, config: peft.PeftConfig) -> torch.Tensor:
    """Writes an adapter that PEFT made for that configuration, with random values, and gives PEFT's logits."""
    model = peft.get_peft_model(tiny_model(architecture), config)
    shaken(model).eval().save_pretrained(folder)
    with torch.no_grad():
        return model(**tiny_inputs()).logits
