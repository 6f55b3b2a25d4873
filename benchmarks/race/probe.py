"""The limit: the matrix products that LoRA cannot do without, of the model's own shapes, and nothing else.

Of each frozen linear layer that is the product with the tokens and that with their gradients, 4·P·T floating point
operations; the frozen weight needs no gradient. The output layer has the scored tokens. Results go into buffers that
are there, and each layer has a weight of its own, as in a model.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from race.contestants import Contestant
from race.turns import Turn


def run(work: dict[str, Any], entry: Contestant, turn: Turn) -> None:
    """Runs the products as often as there are steps."""
    config = AutoConfig.from_pretrained(Path(work["folder"]) / "base")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = [
        torch.randn(module.weight.shape, dtype=torch.bfloat16)
        for _, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    tokens = work["tokens_a_step"]
    features = {size for weight in weights for size in weight.shape}
    read = {size: torch.randn(tokens, size, dtype=torch.bfloat16) for size in features}
    written = {size: torch.empty(tokens, size, dtype=torch.bfloat16) for size in features}
    operations = sum(4 * weight.numel() * tokens for weight in weights)
    for _ in range(work["steps"]):
        for weight in weights:
            torch.mm(read[weight.shape[1]], weight.T, out=written[weight.shape[0]])
        for weight in reversed(weights):
            torch.mm(read[weight.shape[0]], weight, out=written[weight.shape[1]])
        turn.done(examples=work["batch"], tokens=tokens, loss=0.0)
    turn.say(finished=True, trainable=0, quality={}, operations=operations)
