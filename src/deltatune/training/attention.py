"""Which of Transformers' attention implementations a run uses."""

from transformers import PreTrainedModel

_SHORT = 256
"""Tokens up to which plain batched products beat the fused kernel on a CPU; see benchmarks/step.py."""


def choose_attention(model: PreTrainedModel, longest: int) -> None:
    """Sets the implementation that is faster for examples of at most `longest` tokens on the model's device."""
    if model.device.type == "cpu" and longest <= _SHORT:
        model.set_attn_implementation("eager")
