"""The shapes of a run's batches, from its very examples."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from deltatune.data.batches import collate_sequences, padded_length
from deltatune.data.sequences import UNSCORED, Sequences
from deltatune.methods import Method, SoftPrompt
from deltatune.models.attach import parts_of
from deltatune.planning.rehearsal import BatchShape
from deltatune.training.language import read_tokens
from deltatune.training.packing import common_beginning
from deltatune.training.settings import Training


def batch_shapes(
    examples: Any,
    batches: Sequence[Sequence[int]],
    outline: PreTrainedModel,
    method: Method,
    settings: Training,
    step: int,
    *,
    training: bool,
) -> list[BatchShape]:
    """The shape of each batch of encoded examples, given as places; those of a language model have targets.

    Padded lengths are multiples of `step`.
    Packed texts count as so many of one length as have their tokens together. Whether texts are packed is tried out in
    a run; here it is what is usual.
    """
    if not outline.can_generate():
        longest = [max(examples.lengths[place] for place in one) for one in batches]
        widths = [padded_length(length, examples.longest, step) for length in longest]
        return [BatchShape(len(one), width) for one, width in zip(batches, widths, strict=True)]
    both, parts = outline.config.is_encoder_decoder, parts_of(method)
    packs = not both and "packing" not in settings.plain and not any(isinstance(part, SoftPrompt) for part in parts)
    drops = training and (_drops(outline) or any(getattr(part, "dropout", 0) for part in parts))
    shares = "sharing" not in settings.plain and not drops
    return [_packed(examples, one, shares) if packs else _padded(examples, one, both, step) for one in batches]


def _packed(examples: Sequences, places: Sequence[int], shares: bool) -> BatchShape:
    batch = collate_sequences(examples, places, 0)
    read = read_tokens(batch.labels)
    shared = common_beginning(batch.inputs["input_ids"], read) if shares else 0
    row = int(read.sum()) - shared * (len(places) - 1)
    return BatchShape(len(places), -(-row // len(places)), batch.units)


def _padded(examples: Sequences, places: Sequence[int], both: bool, step: int) -> BatchShape:
    inputs, targets = ([column[place] for place in places] for column in (examples.inputs, examples.targets))
    scored = sum(target != UNSCORED for row in targets for target in row)
    width, wide = (padded_length(max(map(len, rows)), examples.longest, step) for rows in (inputs, targets))
    return BatchShape(len(places), width, scored, wide if both else 0)


def _drops(outline: PreTrainedModel) -> bool:
    """Whether the base itself drops something in training."""
    modules = any(isinstance(module, nn.Dropout) and module.p > 0 for module in outline.modules())
    return modules or getattr(outline.config.get_text_config(), "attention_dropout", 0) > 0
