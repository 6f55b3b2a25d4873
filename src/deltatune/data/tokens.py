"""From text to token ids: each example once, unpadded, before training starts."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from deltatune.data.examples import Split


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

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(fields["input_ids"]) for fields in self.fields]


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
    longest = sum(len(f["input_ids"]) >= max_length for f in fields)
    return Tokens(fields, tuple(split.labels), longest)


def length_limit(tokenizer: PreTrainedTokenizerBase, config: Any, wanted: int) -> int:
    """The most tokens an example may have: what is wanted, or what the model and its tokenizer have positions for."""
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or wanted
    # RoBERTa counts positions from the padding id on: two of its 514 are never used by a token.
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "data2vec-text"):
        positions -= config.pad_token_id + 1
    return int(min(wanted, positions, tokenizer.model_max_length))
