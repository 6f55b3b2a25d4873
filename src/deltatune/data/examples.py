"""Texts to be labelled: what every source of data for classification becomes."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from deltatune.data.dataset import Data


@dataclass(frozen=True)
class Split:
    """Texts, or pairs of texts, with the numbers of their labels, in the order of their source."""

    texts: list[str]
    labels: list[int]
    pairs: list[str] | None = None
    """The second text of each pair; None where the texts stand alone."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> "Split":
        """The given rows, in the given order."""
        pairs = None if self.pairs is None else [self.pairs[row] for row in rows]
        return Split([self.texts[row] for row in rows], [self.labels[row] for row in rows], pairs)

    @property
    def strata(self) -> list[int]:
        """The labels: each keeps its share when rows are drawn."""
        return self.labels

    @property
    def keys(self) -> list[Hashable]:
        """The texts, or pairs, without outer spaces."""
        pairs = self.pairs or [""] * len(self)
        return [(text.strip(), pair.strip()) for text, pair in zip(self.texts, pairs, strict=True)]


@dataclass(frozen=True)
class TextData(Data[Split]):
    """A data set for sequence classification: texts, or pairs of texts, with labels."""

    task: ClassVar[str] = "classification"
