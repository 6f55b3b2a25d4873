"""Gradient checkpointing: each block's activations are recomputed in the backward pass instead of kept."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel


@contextmanager
def checkpointing(model: PreTrainedModel, on: bool = True) -> Iterator[None]:
    """Within the block the model's blocks are recomputed in the backward pass, from the lowest trained one on.

    Transformers makes the embeddings' output require a gradient, which only reentrant checkpoints need: the backward
    pass would go down to the input whatever is trained, and recompute every block. That is undone.
    """
    if not on:
        yield
        return
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()
    try:
        yield
    finally:
        model.activation_checkpointing_disable()
