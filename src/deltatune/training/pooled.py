"""The last block of an encoder on the token that a classifier reads: nothing else in it reaches the loss.

Its attention still sees all tokens. What comes after it in the block, the output projection, the residuals, the norms
and the MLP, is computed for the first token of each text alone.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from deltatune.methods import SoftPrompt
from deltatune.models.attach import attachment
from deltatune.models.blocks import stacks
from deltatune.training.modes import evaluating


@contextmanager
def pooled(model: PreTrainedModel, run: Callable[[], Tensor], on: bool = True) -> Iterator[bool]:
    """Within the block the last block of a classifier computes one token of each text; gives whether it does.

    `run` calls the model with texts of some tokens. It is tried out: where the logits are not what they were, because
    the classifier reads other tokens or something in the block needs them, everything stays as it is.
    """
    if not on or end_of_attention(model) is None:
        yield False
        return
    with evaluating(model):
        expected = run()
    handle = first_token_alone(model)
    try:
        with evaluating(model):
            same = _equal(expected, run)
        if not same:
            handle.remove()
        yield same
    finally:
        handle.remove()


def first_token_alone(model: PreTrainedModel) -> RemovableHandle:
    """Lets the last block go on with the first token, whoever reads what, until the handle is removed."""
    end = end_of_attention(model)
    assert end is not None, "the caller has asked"
    return end.register_forward_pre_hook(lambda _, args: tuple(x[:, :1] for x in args))


def end_of_attention(model: PreTrainedModel) -> nn.Module | None:
    """The module of the last block that projects what attention gives and adds what went into it, as in BERT."""
    attached = attachment(model)
    if attached is not None and any(isinstance(part.method, SoftPrompt) for part in attached.parts):
        return None  # virtual tokens stand before the first, and are taken off again
    blocks = stacks(model)
    if len(blocks) != 1 or not hasattr(model, "num_labels") or model.can_generate():
        return None
    last = model.get_submodule(blocks[0][-1])
    ends = (
        m for m in last.modules() if [*inspect.signature(m.forward).parameters] == ["hidden_states", "input_tensor"]
    )
    return next(ends, None)


def _equal(expected: Tensor, run: Callable[[], Tensor]) -> bool:
    """To rounding, since other shapes are multiplied by other kernels."""
    near = 0.02 if expected.dtype == torch.bfloat16 else 1e-4
    try:
        return torch.allclose(run(), expected, rtol=near, atol=near * float(expected.abs().max()))
    except (RuntimeError, IndexError, ValueError):
        return False
