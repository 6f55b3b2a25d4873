"""Texts to learn to write: each example is a row of turns, of which some are scored."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from deltatune.data.dataset import Data

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
    row: int = field(default=0, compare=False)
    """Where it stands in its source, counted from 1; 0 where it has no such place."""

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """The turns before the last scored one."""
        return self.turns[: self._last]

    @property
    def answer(self) -> Turn:
        """The last scored turn."""
        return self.turns[self._last]

    @property
    def _last(self) -> int:
        return max(place for place, turn in enumerate(self.turns) if turn.scored)


@dataclass(frozen=True)
class Dialogues:
    """The examples of one split, in the order of their source. Each has a scored turn."""

    examples: list[Dialogue]

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, rows: Sequence[int]) -> "Dialogues":
        """The given rows, in the given order."""
        return Dialogues([self.examples[row] for row in rows])

    @property
    def strata(self) -> list[int]:
        """One group: rows are drawn without regard to what is in them."""
        return [0] * len(self)

    @property
    def keys(self) -> list[Hashable]:
        """The prompts without outer spaces; of a plain text, which has none, the text."""
        return [
            tuple((turn.role, turn.content.strip()) for turn in example.prompt or (example.answer,))
            for example in self.examples
        ]


@dataclass(frozen=True)
class DialogueData(Data[Dialogues]):
    """A data set for text generation: prompts and completions, instructions, chats or plain texts."""

    task: ClassVar[str] = "generation"
    system: str = ""
    """The system prompt that was put before every example that has none."""
    template: str = ""
    """The words around the columns of the prompt, such as "Summarise: {document}"."""
