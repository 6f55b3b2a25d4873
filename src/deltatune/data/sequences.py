"""Dialogues as token ids: what the model reads, and which of it is scored."""

from dataclasses import dataclass
from functools import cached_property

UNSCORED = -100
"""Stands in the targets where nothing is to be learnt."""


@dataclass(frozen=True)
class Sequences:
    """A split as token ids, unpadded."""

    inputs: tuple[list[int], ...]
    """What a decoder reads, prompt and completion; in an encoder–decoder what the encoder reads."""
    targets: tuple[list[int], ...]
    """Decoder: as long as the input, each scored token in its own place, UNSCORED elsewhere (the shift by one is the
    loss's business). Encoder–decoder: what the decoder is to write, its end token included."""
    truncated: int
    """How many examples were longer than the limit and lost a part."""

    def __len__(self) -> int:
        return len(self.inputs)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each example that the model computes with."""
        return [max(len(read), len(said)) for read, said in zip(self.inputs, self.targets, strict=True)]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(self.lengths, default=0)
