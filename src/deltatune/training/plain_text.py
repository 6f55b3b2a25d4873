"""What training does beside the task, seen on a fixed plain English text that no task is about.

A language model is scored on it before and after: what its loss rises by, it forgot. A classifier's base cannot be
scored so: the head for its own task, such as filling in masked words, is not among its weights any more. What can be
said of it is how far its states of that text moved.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from deltatune.data.dialogues import Dialogue, Dialogues, Turn
from deltatune.data.examples import Split
from deltatune.data.tokens import length_limit
from deltatune.models.base import Base
from deltatune.training.classification import Classification
from deltatune.training.generation import virtual_tokens
from deltatune.training.language import LanguageModelling
from deltatune.training.modes import evaluating
from deltatune.training.precision import Computed

_PARAGRAPHS = 4
"""Of the text whose states are kept: some hundreds of tokens tell a mean well enough."""


def plain_text_loss(base: Base, precision: Computed) -> float | None:
    """Mean cross-entropy a token, in nats; None for a classifier.

    A decoder is scored on every token of each paragraph, an encoder–decoder on the second half of its sentences given
    the first.
    """
    if base.task != "generation":
        return None
    both = bool(base.model.config.is_encoder_decoder)
    paragraphs = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").strip().split("\n\n")
    task = LanguageModelling(base, precision)
    limit = length_limit(base.tokenizer, base.model.config, 256, virtual_tokens(base.model))
    return task.evaluate(
        task.encode(Dialogues([_halves(one) if both else _whole(one) for one in paragraphs]), limit)
    ).loss


def plain_text_states(base: Base, precision: Computed) -> Float[Tensor, "tokens width"] | None:
    """What a classifier's base gives for tokens of the text in the end, in fp32; None for a language model."""
    if base.task != "classification":
        return None
    found: list[Tensor] = []

    def keep(_: object, __: object, output: Any) -> None:
        found.append(output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0])

    task = Classification(base, precision)
    texts = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").strip().split("\n\n")[:_PARAGRAPHS]
    limit = length_limit(base.tokenizer, base.model.config, 256, virtual_tokens(base.model))
    tokens = task.encode(Split(texts, [0] * len(texts)), limit)
    handle = base.model.base_model.register_forward_hook(keep)
    try:
        with evaluating(base.model):
            batches = [task.collate(tokens, [place]) for place in range(len(tokens))]
            for batch in batches:
                task.run(batch)
    finally:
        handle.remove()
    # Virtual tokens, where they are still there, stand in front; what was added to fill a row stands behind.
    texts_alone = [
        states[0, -batch.inputs["input_ids"].shape[1] :][: batch.tokens].float().cpu()
        for states, batch in zip(found, batches, strict=True)
    ]
    return torch.cat(texts_alone)


def drift(before: Float[Tensor, "tokens width"], after: Float[Tensor, "tokens width"]) -> float:
    """The mean over tokens of 1 minus the cosine of the states before and after: 0 where none turned, at most 2."""
    return 1 - F.cosine_similarity(before, after, dim=-1).mean().item()


def _whole(paragraph: str) -> Dialogue:
    return Dialogue((Turn("text", paragraph, True),))


def _halves(paragraph: str) -> Dialogue:
    sentences = paragraph.split(". ")
    middle = len(sentences) // 2
    first, second = ". ".join(sentences[:middle]) + ".", ". ".join(sentences[middle:])
    return Dialogue((Turn("text", first, False), Turn("text", second, True)))
