"""From a name to data: embedded, from a file or folder, or from the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltatune.data.columns import find_columns
from deltatune.data.embedded import EMBEDDED
from deltatune.data.examples import TextData
from deltatune.data.hub import looks_like_hub_id, read_hub
from deltatune.data.labels import class_names, has_labels, label_order
from deltatune.data.local import ENDINGS, looks_like_path, no_such_path, read_path
from deltatune.data.rows import read_rows
from deltatune.data.source import Source
from deltatune.data.splits import complete
from deltatune.errors import UserError, unknown


def load_data(name: str, *, text: tuple[str, ...] = (), label: str = "", seed: int = 0) -> TextData:
    """The data set of this name, in three splits.

    `name` is an embedded name; a file in CSV, TSV, JSON lines, JSON or Parquet, or a folder with one for each split;
    or owner/name on the hub, with :CONFIGURATION and @REVISION where needed. An embedded name wins over a like file.
    `text` (two for pairs) and `label` name columns, which are found otherwise; `seed` draws the missing splits.
    Raises UserError for everything that the user can mend.
    """
    if name in EMBEDDED:
        if text or label:
            raise UserError(f"the columns of '{name}' are fixed", "leave out --text and --label")
        return EMBEDDED[name]()
    return _assemble(name, _source(name), text, label, seed)


def _source(name: str) -> Source:
    path = Path(name).expanduser()
    if path.exists():
        return read_path(path)
    if looks_like_path(name):
        raise no_such_path(path)
    if looks_like_hub_id(name):
        return read_hub(name)
    raise unknown("data set", name, EMBEDDED, f"give a folder, a file ending in {ENDINGS}, or owner/name on the hub")


def _assemble(name: str, source: Source, text: tuple[str, ...], label: str, seed: int) -> TextData:
    """Reads every table, numbers the labels by those in training, and makes the splits that are missing."""
    train = source.tables["train"]
    with _naming(name, "train"):
        columns = find_columns(train, text, label)
        rows = read_rows(train, columns)
        known = label_order(rows.labels, columns.label)
        # Where the table itself names its classes, all of them count, also those of which training has no row.
        labels = class_names(train, columns.label) or known
        given = {"train": rows.numbered(labels, known)}
        incomplete = rows.incomplete
    secret = False
    for split, table in source.tables.items():
        if split == "train":
            continue
        with _naming(name, split):
            if split == "test" and not has_labels(table, columns.label, known):
                secret = True  # benchmarks publish their test texts without the answers
                continue
            rows = read_rows(table, columns)
            given[split] = rows.numbered(labels, known)
            incomplete += rows.incomplete
    with _naming(name, "train"):
        splits = complete(given, seed)
    return TextData(
        name=name,
        revision=source.revision,
        labels=tuple(labels),
        train=splits.train,
        validation=splits.validation,
        test=splits.test,
        text=columns.text,
        label=columns.label,
        splitting=splits.words + ("; the test split that came along has no labels" if secret else ""),
        duplicates=splits.duplicates,
        incomplete=incomplete,
    )


@contextmanager
def _naming(name: str, part: str) -> Iterator[None]:
    """Says in every error which data and which split it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name} ({part}): {error.message}", error.hint) from error
