"""What a language model forgets: its loss on a fixed plain English text that no task is about."""

from pathlib import Path

from deltatune.data.dialogues import Dialogue, Dialogues, Turn
from deltatune.data.tokens import length_limit
from deltatune.models.base import Base
from deltatune.training.generation import virtual_tokens
from deltatune.training.language import LanguageModelling
from deltatune.training.precision import Computed


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


def _whole(paragraph: str) -> Dialogue:
    return Dialogue((Turn("text", paragraph, True),))


def _halves(paragraph: str) -> Dialogue:
    sentences = paragraph.split(". ")
    middle = len(sentences) // 2
    first, second = ". ".join(sentences[:middle]) + ".", ". ".join(sentences[middle:])
    return Dialogue((Turn("text", first, False), Turn("text", second, True)))
