"""Which columns of a table hold the texts and the labels: as given, else by their names, else by what is in them."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltatune.errors import UserError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

PAIR_NAMES = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"),
    ("sentence_a", "sentence_b"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
    ("question", "sentence"),
    ("query", "passage"),
)
# The first name of each wins where it stands beside others.
TEXT_NAMES = ("text", "sentence", "review", "content", "comment", "document", "message", "tweet", "body", "utterance")
LABEL_NAMES = (
    *("label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "emotion"),
    *("gold_label", "is_duplicate", "rating", "stars"),
)

# As many rows show what a column holds; the columns that are used are checked whole when they are read.
SAMPLE = 1000
HINT = "say which columns to use with --text COLUMN (twice for pairs) and --label COLUMN"


@dataclass(frozen=True)
class Columns:
    """The names of the columns in use: one of text, or two for pairs, and one of labels."""

    text: tuple[str, ...]
    label: str


def find_columns(table: "Dataset", text: Sequence[str] = (), label: str = "") -> Columns:
    """The columns to use; those given are used as they are.

    Raises UserError for an empty table, a given column that is not there, and where no column or several would do.
    """
    if not len(table):
        raise UserError("there are no rows")
    for name in filter(None, (*text, label)):
        require_column(table, name)
    if len(text) > 2 or label in text:
        raise UserError(f"cannot use {listed((*text, label))} as texts and label", HINT)
    sample = sample_of(table)
    chosen = tuple(text) or usual_text({name: sample[name] for name in sample if name != label})
    label = label or _label({name: sample[name] for name in sample if name not in chosen})
    return Columns(chosen or only_text({name: sample[name] for name in sample if name != label}), label)


def require_column(table: "Dataset", name: str) -> None:
    """Raises UserError where the table has no such column."""
    if name not in table.column_names:
        close = listed(nearest(name, table.column_names))
        raise UserError(f"there is no column '{name}'; there are {listed(table.column_names)}", f"nearest: {close}")


def kind(values: Sequence[Any]) -> str:
    """What the values are, in the words of the error messages: "text", "numbers", "true or false" …"""
    present = [value for value in values if value is not None]
    if not present:
        return "nothing"
    if all(isinstance(value, bool) for value in present):
        return "true or false"
    if all(_is_number(value) for value in present):
        return "numbers"
    return "text" if all(isinstance(value, str) for value in present) else "dates, lists or mixed values"


def too_many(distinct: int, rows: int) -> bool:
    """Whether values that differ this often are no labels: each label should come twice at least."""
    return distinct > max(2, rows / 2)


def sample_of(table: "Dataset") -> dict[str, list[Any]]:
    """The first rows of every column that may hold texts or labels; images, lists and the like are not decoded."""
    from datasets import ClassLabel, Value

    plain = [name for name, feature in table.features.items() if isinstance(feature, (Value, ClassLabel))]
    rows = range(min(SAMPLE, len(table)))
    return {name: table.select_columns(name).select(rows)[name][:] for name in plain}


def usual_text(sample: Mapping[str, list[Any]]) -> tuple[str, ...]:
    """The columns with a usual name for a pair of texts or for a text; () where there is none."""
    here = {name.lower(): name for name in sample}
    for first, second in PAIR_NAMES:
        if first in here and second in here:
            return here[first], here[second]
    found = [here[name] for name in TEXT_NAMES if name in here]
    return (_only("text", found, first=TEXT_NAMES[0]),) if found else ()


def usual_label(names: Iterable[str]) -> list[str]:
    """The columns with a usual name for labels."""
    here = {name.lower(): name for name in names}
    return [here[name] for name in LABEL_NAMES if name in here]


def only_text(sample: Mapping[str, list[Any]]) -> tuple[str]:
    """The only column of text that no label would repeat as often, whatever its name."""
    texts = [name for name, values in sample.items() if kind(values) == "text"]
    varied = [name for name in texts if not like_labels(sample[name])]
    if not texts:
        held = ", ".join(f"'{name}' holds {kind(values)}" for name, values in sample.items())
        raise UserError(f"no column holds text{': ' if held else ''}{held}", HINT)
    return (_only("text", varied or texts),)


def _label(sample: Mapping[str, list[Any]]) -> str:
    """The column with a usual name for labels; else the only one whose values repeat as labels do."""
    if found := usual_label(sample):
        return _only("label", found, first=LABEL_NAMES[0])
    found = [name for name, values in sample.items() if like_labels(values)]
    if not found:
        raise UserError(f"no column looks like labels; there are {listed(sample)}", HINT)
    return _only("label", found)


def _only(what: str, found: Sequence[str], first: str = "") -> str:
    """The one column found, or the one with the first name; UserError where it takes a guess."""
    if len(found) == 1 or found[0].lower() == first:
        return found[0]
    raise UserError(f"more than one column could be the {what}: {listed(found)}", HINT)


def like_labels(values: Sequence[Any]) -> bool:
    """Whether the values are of a kind that labels are, and repeat as labels do."""
    present = [value for value in values if value is not None]
    whole = all(not isinstance(value, float) or value.is_integer() for value in present)
    return (
        kind(present) in ("text", "numbers", "true or false") and whole and not too_many(len({*present}), len(present))
    )


def _is_number(value: object) -> bool:
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True


def listed(names: Collection[str]) -> str:
    """The names in quotation marks, as the error messages list them."""
    return ", ".join(f"'{name}'" for name in names if name)
