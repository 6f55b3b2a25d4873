"""From text to token ids: each example once, unpadded, before training starts."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from deltatune.data.examples import Split
from deltatune.models.positions import room_for_text


@dataclass(frozen=True)
class Tokens:
    """A split as token ids."""

    fields: tuple[dict[str, list[int]], ...]
    """For each example what the model takes: `input_ids` and, where the model has them, `token_type_ids`."""
    labels: tuple[int, ...]
    truncated: int
    """How many examples were longer than the limit and lost their end."""

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(fields["input_ids"]) for fields in self.fields]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(self.lengths, default=0)


def tokenize(split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokens:
    """Encodes every text, or sentence pair, of a split; what is longer than `max_length` tokens is cut at the end."""
    if not len(split):
        return Tokens((), (), 0)
    encoded: Any = tokenizer(
        split.texts,
        split.pairs,
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_length=False,
    )
    names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
    fields = tuple({name: encoded[name][i] for name in names} for i in range(len(split)))
    full = split.take([place for place, one in enumerate(fields) if len(one["input_ids"]) >= max_length])
    whole: Any = tokenizer(full.texts, full.pairs, verbose=False) if len(full) else {"input_ids": []}
    return Tokens(fields, tuple(split.labels), sum(len(ids) > max_length for ids in whole["input_ids"]))


def length_limit(tokenizer: PreTrainedTokenizerBase, config: Any, wanted: int, virtual: int = 0) -> int:
    """The most tokens an example may have: what is wanted, or what the model and its tokenizer have positions for.

    `virtual` tokens take positions too. Raises `UserError` where they leave none.
    """
    room = room_for_text(config, virtual)
    return int(min(wanted, wanted if room is None else room, tokenizer.model_max_length))
