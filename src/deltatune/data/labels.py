"""Reading labels: strings, whole numbers, true or false, or numbers with names of their own, all as names."""

import math
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from deltatune.data.columns import HINT, kind, too_many
from deltatune.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

INTEGER = re.compile(r"[+-]?\d+")
# How benchmarks say that a label is kept secret.
SECRET = "-1"


def read_labels(table: "Dataset", column: str) -> list[str]:
    """The labels' names, row by row, "" where there is none."""
    names = class_names(table, column)
    values = table.select_columns(column)[column][:]
    if names:
        # Where classes have names, -1 stands for a missing label.
        return [names[value] if value is not None and value >= 0 else "" for value in values]
    return [_label_name(value, column) for value in values]


def class_names(table: "Dataset", column: str) -> list[str]:
    """The names that the table itself has for its labels, in their order; [] where it has none."""
    return list(getattr(table.features[column], "names", None) or [])


def has_labels(table: "Dataset", column: str, known: Collection[str]) -> bool:
    """Whether any row has a label; -1 is one only where training knows it."""
    if column not in table.column_names:
        return False
    none = {""} if SECRET in known else {"", SECRET}
    return not none.issuperset(read_labels(table, column))


def label_order(labels: Sequence[str], column: str) -> list[str]:
    """The names of the labels in training: integers by value, others by the alphabet.

    Raises UserError for a single label, for fractions, and for nearly as many values as there are rows.
    """
    names = sorted(set(labels))
    if len(names) == 1:
        raise UserError(f"all {len(labels)} rows have the label '{names[0]}'", "give data with two labels at least")
    integers = all(INTEGER.fullmatch(name) for name in names)
    if not integers and kind(names) == "numbers":
        fraction = next(name for name in names if not INTEGER.fullmatch(name))
        raise UserError(
            f"the label column '{column}' holds continuous numbers such as {fraction}, not classes",
            "make classes of them, such as low and high, or choose another column with --label",
        )
    if too_many(len(names), len(labels)):
        many = f"the label column '{column}' has {len(names)} different values in {len(labels)} rows"
        raise UserError(f"{many}: these are no classes", "choose another column with --label COLUMN")
    return sorted(names, key=lambda name: (int(name), name)) if integers else names


def _label_name(value: Any, column: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str):
        # Spreadsheets and pandas write whole numbers as 1.0 when a cell of the column is empty.
        return re.sub(r"^([+-]?\d+)\.0+$", r"\1", value.strip())
    if isinstance(value, (bool, int, float)):
        return str(value)
    raise UserError(f"the label column '{column}' holds {kind([value])}, not labels", HINT)
