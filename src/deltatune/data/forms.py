"""Which form a table for text generation has: prompts with completions, instructions, chats, or plain text."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Literal

from deltatune.data.columns import (
    PAIR_NAMES,
    TEXT_NAMES,
    kind,
    like_labels,
    listed,
    only_text,
    require_column,
    sample_of,
    usual_label,
    usual_text,
)
from deltatune.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

PROMPT_NAMES = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("meaning_representation", "human_reference"),
    ("document", "summary"),
    ("text", "summary"),
    ("dialogue", "summary"),
    ("article", "highlights"),
    ("source", "target"),
    ("question", "answer"),
    ("input", "output"),
)
COMPLETION_NAMES = tuple(dict.fromkeys(completion for _, completion in PROMPT_NAMES))
_ALSO_LABELS = ("target", "answer", "output")
"""Names of completions that stand over labels as often: there, what is in the column decides."""
INSTRUCTION_NAMES = ("output", "response", "completion", "answer")
"""How the answer to an `instruction` is called."""
INPUT_NAMES = ("input", "context")
"""What may come along with an `instruction`."""
CHAT_NAMES = ("messages", "conversations", "conversation")
HINT = (
    "texts to be written come as prompt and completion, instruction and output, messages, or text alone; "
    "name other columns with --text PROMPT and --label COMPLETION, or words around them with --template"
)


Kind = Literal["prompt", "instruction", "chat", "text"]


@dataclass(frozen=True)
class Form:
    """How examples are read from a table's columns."""

    kind: Kind
    text: tuple[str, ...]
    """The columns of the prompt; of an instruction, then of its input; the column of the chats; that of the texts."""
    label: str = ""
    """The column of what is to be written; "" for chats and plain texts."""
    system: str = ""
    """What the system says before every example that has no such turn."""
    template: str = ""
    """The words around the columns of the prompt."""


def find_form(
    table: "Dataset", *, task: str, text: Sequence[str] = (), label: str = "", system: str = "", template: str = ""
) -> Form | None:
    """The form of a table's examples; None where they are texts with labels, for classification.

    `task` is "classification" or "generation" where it is given, else the columns decide: usual names for a text and a
    label are for classification, then usual names for what is written or a column of chats are for generation.
    Raises UserError for a given column that is not there, and where generation is asked for and no form fits.
    """
    if not len(table):
        raise UserError("there are no rows")
    for name in filter(None, (*text, label)):
        require_column(table, name)
    wanted = task == "generation" or bool(template or system)
    if task == "classification":
        return None
    form = _by_template(table, text, label, template) if template else _by_columns(table, text, label, wanted)
    if form is None:
        return None
    if system and form.kind == "text":
        raise UserError("a system prompt has no place before plain text", "leave it out, or give prompts to complete")
    return Form(form.kind, form.text, form.label, system, template)


def template_parts(template: str) -> list[tuple[str, str]]:
    """The template as words, each with the column that stands after them ("" after the last).

    Raises UserError where it is not made of words and {column}.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"the template {template!r} cannot be read: {error}", _TEMPLATE_HINT) from error
    for _, column, spec, conversion in parts:
        if column == "" or spec or conversion:
            raise UserError(f"the template {template!r} has braces without a column's name alone", _TEMPLATE_HINT)
    if not any(column for _, column, *_ in parts):
        raise UserError(f"the template {template!r} names no column", _TEMPLATE_HINT)
    return [(words, column or "") for words, column, *_ in parts]


_TEMPLATE_HINT = (
    "write it as 'Summarise: {document}', with the columns in braces; {{ and }} stand for braces themselves"
)


def _by_template(table: "Dataset", text: Sequence[str], label: str, template: str) -> Form:
    if text:
        raise UserError("the template names the prompt's columns already", "leave out --text")
    columns = tuple(dict.fromkeys(column for _, column in template_parts(template) if column))
    for column in columns:
        require_column(table, column)
    here = {name.lower(): name for name in table.column_names if name not in columns}
    label = label or next((here[name] for name in COMPLETION_NAMES if name in here), "")
    if label in columns:
        raise UserError(f"the template puts '{label}', which is to be written, into the prompt", "leave it out there")
    if not label:
        raise UserError(
            f"no column looks like completions; there are {listed(table.column_names)}",
            "name the one that holds what is to be written with --label COLUMN",
        )
    return Form("prompt", columns, label)


def _by_columns(table: "Dataset", text: Sequence[str], label: str, wanted: bool) -> Form | None:
    """The form that fits what was given and what is there; None where none does, or where it is classification."""
    if text:
        return _as_given(table, text, label, wanted)
    here = {name.lower(): name for name in table.column_names}
    if not wanted and _has_usual_text(here) and usual_label([label] if label else here):
        return None
    chats = [here[name] for name in CHAT_NAMES if name in here and _holds_chats(table, here[name])]
    if chats and not label:
        return Form("chat", (chats[0],))
    sample = sample_of(table)
    for form in _usual_forms(here):
        of_labels = form.label.lower() in _ALSO_LABELS and like_labels(sample.get(form.label, ()))
        if label in ("", form.label) and (wanted or form.kind == "instruction" or not of_labels):
            return form
    others = {name: values for name, values in sample.items() if name != label}
    if wanted:
        kind_of_form: Kind = "prompt" if label else "text"
        return Form(kind_of_form, usual_text(others)[:1] or only_text(others), label)
    alone = len(here) == 1 and next(iter(here)) in TEXT_NAMES and not label
    return Form("text", tuple(here.values())) if alone else None


def _as_given(table: "Dataset", text: Sequence[str], label: str, wanted: bool) -> Form | None:
    if wanted and (len(text) > 1 or label in text):
        raise UserError(
            f"cannot use {listed((*text, label))} as prompt and completion",
            "name one column with --text and another with --label, or several in a --template",
        )
    if len(text) > 1:
        return None
    if not label and _holds_chats(table, text[0]):
        return Form("chat", tuple(text))
    if not label:
        return Form("text", tuple(text)) if wanted else None
    completions = sample_of(table).get(label, ())
    free = kind(completions) == "text" and not like_labels(completions)
    return Form("prompt", tuple(text), label) if wanted or (free and label not in text) else None


def _usual_forms(here: dict[str, str]) -> Iterator[Form]:
    """The forms whose usual columns are all there, as lower-case names with the names themselves."""
    if "instruction" in here:
        added = [here[name] for name in INPUT_NAMES if name in here]
        for name in INSTRUCTION_NAMES:
            if name in here:
                yield Form("instruction", (here["instruction"], *added[:1]), here[name])
    for prompt, completion in PROMPT_NAMES:
        if prompt in here and completion in here:
            yield Form("prompt", (here[prompt],), here[completion])


def _has_usual_text(here: Collection[str]) -> bool:
    return any(name in here for name in TEXT_NAMES) or any(a in here and b in here for a, b in PAIR_NAMES)


def _holds_chats(table: "Dataset", column: str) -> bool:
    """Whether the first cell that holds anything is a list of records, or one that the table keeps as columns."""
    cell = next((cell for cell in table.select_columns(column)[column] if cell), None)
    return isinstance(cell[0] if isinstance(cell, list) else cell, dict)
