"""Reading the texts and labels of one split: what is missing is dropped and counted, what is wrong is refused."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltatune.data.columns import HINT, Columns, kind, require_column
from deltatune.data.examples import Split
from deltatune.data.labels import read_labels
from deltatune.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Rows:
    """The complete rows of one split, with the labels' names."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[str]
    places: list[int]
    """Where each row stands in its source, counted from 1."""
    incomplete: int
    """How many rows lack a text or a label."""

    def numbered(self, order: Sequence[str], known: Collection[str]) -> Split:
        """The rows with each label as its place in `order`; UserError for a label that is not among the known ones."""
        unseen: dict[str, int] = {}
        for label, place in zip(self.labels, self.places, strict=True):
            if label not in known:
                unseen.setdefault(label, place)
        if unseen:
            listed = ", ".join(f"'{label}' (first in row {place})" for label, place in [*unseen.items()][:5])
            raise UserError(
                f"there are labels here that training does not have: {listed}",
                f"training has {', '.join(known)}: correct these rows or leave them out",
            )
        numbers = {label: number for number, label in enumerate(order)}
        return Split(self.texts, [numbers[label] for label in self.labels], self.pairs)


def read_rows(table: "Dataset", columns: Columns) -> Rows:
    """All rows with a text and a label. Raises UserError for texts that are none, and where no row is complete."""
    for name in (*columns.text, columns.label):
        require_column(table, name)
    texts = [_texts(table, name) for name in columns.text]
    labels = read_labels(table, columns.label)
    kept = [row for row, cells in enumerate(zip(*texts, labels, strict=True)) if all(cells)]
    if not kept:
        needed = f"a text in {' and '.join(columns.text)} and a label in {columns.label}"
        raise UserError(f"none of the {len(table)} rows has {needed}", HINT)
    first, *second = [[column[row] for row in kept] for column in texts]
    return Rows(
        texts=first,
        pairs=second[0] if second else None,
        labels=[labels[row] for row in kept],
        places=[row + 1 for row in kept],
        incomplete=len(table) - len(kept),
    )


def _texts(table: "Dataset", column: str) -> list[str]:
    """The texts as they are, "" where there is none or nothing but spaces."""
    values = table.select_columns(column)[column][:]
    if (held := kind(values)) not in ("text", "nothing"):
        raise UserError(f"the text column '{column}' holds {held}, not text", HINT)
    return [value if value and value.strip() else "" for value in values]
