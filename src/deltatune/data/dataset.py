"""A data set in three splits, whatever its examples are, and what the report says about where it comes from."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Protocol, Self, TypeVar

from deltatune.data.stratify import spread
from deltatune.errors import UserError


class Part(Protocol):
    """The examples of one split, in the order of their source."""

    def __len__(self) -> int: ...

    def take(self, rows: Sequence[int]) -> Self:
        """The given rows, in the given order."""

    @property
    def strata(self) -> Sequence[int]:
        """For each row the group whose share is kept when rows are drawn by lot."""

    @property
    def keys(self) -> list[Hashable]:
        """For each row what it must not share with another one: rows with the same key are duplicates."""


P = TypeVar("P", bound=Part)


@dataclass(frozen=True)
class Data(Generic[P]):
    """What data sets of every task have in common."""

    name: str
    revision: str
    """Embedded: package and version. Hub: the commit. Local: "sha256:" and the digest of the files."""
    labels: tuple[str, ...]
    """The names of the labels, a label's number being its place here; () where texts are to be written."""
    train: P
    validation: P
    test: P
    text: tuple[str, ...]
    """The columns that the texts, or the prompts, come from."""
    label: str
    """The column that the labels, or the completions, come from; "" where the text column holds all."""
    splitting: str
    """How the splits came about, in words."""
    duplicates: int = 0
    """Rows dropped before splitting because the same text, or prompt, stands in another row."""
    incomplete: int = 0
    """Rows dropped because their text, or what is to be learnt of it, is missing."""

    @property
    def place(self) -> str:
        """The name that finds the same data again, from any folder: a path in full, a hub id with its commit."""
        if self.revision.startswith("sha256:"):
            return str(Path(self.name).expanduser().resolve())
        on_hub = len(self.revision) == 40 and "/" in self.name
        return f"{self.name.partition('@')[0]}@{self.revision}" if on_hub else self.name

    def limited(self, train: int | None, validation: int | None, test: int | None, seed: int) -> Self:
        """The same data with at most so many rows a split, drawn by `seed` with each label's share kept.

        None takes a split whole. Raises UserError for a limit below one row, or below the number of labels there are.
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
        return replace(data, splitting=f"{self.splitting}; limited to {sizes}, {drawn(data.train, seed)}")


def drawn(part: Part, seed: int) -> str:
    """How rows are drawn from such a split, in words."""
    return f"stratified, seed {seed}" if len(set(part.strata)) > 1 else f"drawn by lot, seed {seed}"


def _limited(split: P, name: str, limit: int | None, seed: int) -> P:
    if limit is None or limit >= len(split):
        return split
    groups = len(set(split.strata))
    if limit < groups and groups > 1:
        raise UserError(
            f"a limit of {limit} on the {name} rows leaves out labels: there are {groups}",
            f"take at least {groups} {name} rows, better some dozens of each label",
        )
    if limit < 1:
        raise UserError(f"a limit of {limit} on the {name} rows leaves none", f"take at least 1 of the {name} rows")
    return split.take(sorted(spread(split.strata, seed)[:limit]))
