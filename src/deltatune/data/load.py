"""From a name to data: embedded, from a file or folder, or from the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltatune.data.columns import find_columns
from deltatune.data.dialogues import DialogueData, Dialogues
from deltatune.data.embedded import EMBEDDED
from deltatune.data.examples import TextData
from deltatune.data.forms import Form, find_form
from deltatune.data.hub import looks_like_hub_id, read_hub
from deltatune.data.labels import class_names, has_labels, label_order
from deltatune.data.local import ENDINGS, looks_like_path, no_such_path, read_path
from deltatune.data.rows import read_rows
from deltatune.data.source import Source
from deltatune.data.splits import complete
from deltatune.data.turns import has_completions, read_dialogues
from deltatune.errors import UserError, unknown

TASKS = (TextData.task, DialogueData.task)


def load_data(
    name: str,
    *,
    task: str = "",
    text: tuple[str, ...] = (),
    label: str = "",
    system: str = "",
    template: str = "",
    seed: int = 0,
) -> TextData | DialogueData:
    """The data set of this name, in three splits.

    `name` is an embedded name; a file in CSV, TSV, JSON lines, JSON or Parquet, or a folder with one for each split;
    or owner/name on the hub, with :CONFIGURATION and @REVISION where needed. An embedded name wins over a like file.

    The columns decide whether it is for classification (`TextData`) or generation (`DialogueData`), or `task` does,
    which is then "classification" or "generation". `text` and `label` name columns, which are found otherwise: the text
    (two for pairs) and its label; the prompt and the completion; the chat alone, or the plain text alone. For
    generation, `template` puts words around columns ("Summarise: {document}") to make the prompt of, and `system` is
    what the system says first, which makes a chat of a prompt and its completion. Where neither brings a space, a
    prompt and its completion are set apart by a line break, after a template by a space. `seed` draws missing splits.
    Raises UserError for everything that the user can mend.
    """
    if task not in ("", *TASKS):
        raise unknown("task", task, TASKS)
    if task == TextData.task and (system or template):
        raise UserError("texts to be labelled have no system prompt and no template", "leave them out, or the task")
    if name in EMBEDDED:
        return _embedded(name, task, bool(text or label), bool(system or template))
    source = _source(name)
    with _naming(name, "train"):
        form = find_form(source.tables["train"], task=task, text=text, label=label, system=system, template=template)
    if form is None:
        return _text_data(name, source, text, label, seed)
    return _dialogue_data(name, source, form, seed)


def _embedded(name: str, task: str, columns: bool, words: bool) -> TextData | DialogueData:
    if columns:
        raise UserError(f"the columns of '{name}' are fixed", "leave out --text and --label")
    if words:
        raise UserError(f"the prompts of '{name}' are fixed", "leave out --system and --template")
    data = EMBEDDED[name]()
    if task not in ("", data.task):
        raise UserError(f"'{name}' is for {data.task}, not for {task}", f"leave out the task, or say {data.task}")
    return data


def _source(name: str) -> Source:
    path = Path(name).expanduser()
    if path.exists():
        return read_path(path)
    if looks_like_path(name):
        raise no_such_path(path)
    if looks_like_hub_id(name):
        return read_hub(name)
    raise unknown("data set", name, EMBEDDED, f"give a folder, a file ending in {ENDINGS}, or owner/name on the hub")


def _text_data(name: str, source: Source, text: tuple[str, ...], label: str, seed: int) -> TextData:
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


def _dialogue_data(name: str, source: Source, form: Form, seed: int) -> DialogueData:
    """Reads every table as rows of turns, and makes the splits that are missing."""
    given: dict[str, Dialogues] = {}
    incomplete = 0
    secret = False
    for split, table in source.tables.items():
        with _naming(name, split):
            if split == "test" and not has_completions(table, form):
                secret = True
                continue
            given[split], lacking = read_dialogues(table, form)
            incomplete += lacking
    with _naming(name, "train"):
        splits = complete(given, seed)
    return DialogueData(
        name=name,
        revision=source.revision,
        labels=(),
        train=splits.train,
        validation=splits.validation,
        test=splits.test,
        text=form.text,
        label=form.label,
        splitting=splits.words + ("; the test split that came along has no completions" if secret else ""),
        duplicates=splits.duplicates,
        incomplete=incomplete,
        system=form.system,
        template=form.template,
    )


@contextmanager
def _naming(name: str, part: str) -> Iterator[None]:
    """Says in every error which data and which split it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name} ({part}): {error.message}", error.hint) from error
