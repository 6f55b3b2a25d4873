"""Texts to learn to write: each example is a row of turns, of which some are scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["text", "system", "user", "assistant", "tool"]
"""Who speaks. "text" is nobody: prompt, completion or plain text that no chat template wraps."""


@dataclass(frozen=True)
class Turn:
    """One piece of an example."""

    role: Role
    content: str
    scored: bool
    """Whether the model is to learn to write it."""


@dataclass(frozen=True)
class Dialogue:
    """One example: its turns in order."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Dialogues:
    """The examples of one split, in the order of their source."""

    examples: list[Dialogue]

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, rows: Sequence[int]) -> "Dialogues":
        """The given rows, in the given order."""
        return Dialogues([self.examples[row] for row in rows])
