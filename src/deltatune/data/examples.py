"""What every source of data becomes: texts with labels in three splits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deltatune.data.stratify import spread
from deltatune.errors import UserError


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


@dataclass(frozen=True)
class TextData:
    """A data set for sequence classification, and what the report says about where it comes from."""

    name: str
    revision: str
    """Embedded: package and version. Hub: the commit. Local: "sha256:" and the digest of the files."""
    labels: tuple[str, ...]
    """The names of the labels; a label's number is its place here."""
    train: Split
    validation: Split
    test: Split
    text: tuple[str, ...]
    """The columns that the texts come from: one, or two for pairs."""
    label: str
    """The column that the labels come from."""
    splitting: str
    """How the splits came about, in words."""
    duplicates: int = 0
    """Rows dropped before splitting because the same text stands in another row."""
    incomplete: int = 0
    """Rows dropped because their text or their label is missing."""

    @property
    def place(self) -> str:
        """The name that finds the same data again, from any folder: a path in full, a hub id with its commit."""
        if self.revision.startswith("sha256:"):
            return str(Path(self.name).expanduser().resolve())
        on_hub = len(self.revision) == 40 and "/" in self.name
        return f"{self.name.partition('@')[0]}@{self.revision}" if on_hub else self.name

    def limited(self, train: int | None, validation: int | None, test: int | None, seed: int) -> "TextData":
        """The same data with at most so many rows a split, drawn by `seed` with each label's share kept.

        None takes a split whole. Raises UserError for a limit below the number of labels in its split.
        """
        data = replace(
            self,
            train=_limited(self.train, "train", train, seed),
            validation=_limited(self.validation, "validation", validation, seed),
            test=_limited(self.test, "test", test, seed),
        )
        if data == self:
            return self
        sizes = f"{len(data.train)} train, {len(data.validation)} validation and {len(data.test)} test rows"
        return replace(data, splitting=f"{self.splitting}; limited to {sizes}, stratified, seed {seed}")


def _limited(split: Split, name: str, limit: int | None, seed: int) -> Split:
    if limit is None or limit >= len(split):
        return split
    if limit < (labels := len(set(split.labels))):
        raise UserError(
            f"a limit of {limit} on the {name} rows leaves out labels: there are {labels}",
            f"take at least {labels} {name} rows, better some dozens of each label",
        )
    return split.take(sorted(spread(split.labels, seed)[:limit]))
