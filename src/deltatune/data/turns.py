"""Reading the examples of one split for generation: rows of turns from columns, instructions, chats or plain texts."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from deltatune.data.columns import kind, listed, require_column
from deltatune.data.dialogues import Dialogue, Dialogues, Role, Turn
from deltatune.data.forms import HINT, Form, template_parts
from deltatune.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

ROLES: dict[str, Role] = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
"""Who speaks, by all names: those of chat templates (`role`) and of ShareGPT (`from`)."""


def read_dialogues(table: "Dataset", form: Form) -> tuple[Dialogues, int]:
    """All examples with something to write, and how many rows lack it, or a part of their prompt.

    Raises UserError for cells that hold no text or no chat, and where no row is complete.
    """
    for name in filter(None, (*form.text, form.label)):
        require_column(table, name)
    read = _chats(table, form) if form.kind == "chat" else _rows(table, form)
    examples = [Dialogue(turns, row) for row, turns in enumerate(read, 1) if turns]
    if not examples:
        what = "an assistant's turn" if form.kind == "chat" else "text"
        raise UserError(f"none of the {len(table)} rows has {what} in {listed((*form.text, form.label))}", HINT)
    return Dialogues(examples), len(table) - len(examples)


def has_completions(table: "Dataset", form: Form) -> bool:
    """Whether any row says what is to be written; tests that are published without answers do not."""
    if not form.label:
        return True
    return form.label in table.column_names and any(_texts(table, form.label))


def _rows(table: "Dataset", form: Form) -> Iterator[tuple[Turn, ...]]:
    """The turns of each row; none where a text is missing."""
    columns = [_texts(table, name) for name in (*form.text, *filter(None, [form.label]))]
    optional = 1 if form.kind == "instruction" else len(form.text)  # an instruction's input may be missing
    for cells in zip(*columns, strict=True):
        needed = (*cells[:optional], cells[-1])
        yield _turns(cells, form) if all(needed) else ()


def _turns(cells: tuple[str, ...], form: Form) -> tuple[Turn, ...]:
    if form.kind == "text":
        return (Turn("text", cells[0], scored=True),)
    *asked, answer = cells
    if form.kind == "instruction":
        prompt = ["\n\n".join(filter(None, asked))]
    elif form.template:
        cell_of = dict(zip(form.text, asked, strict=True))
        pieces = (piece for words, column in template_parts(form.template) for piece in (words, cell_of.get(column)))
        prompt = [piece for piece in pieces if piece]
    else:
        prompt = asked
    if form.kind == "instruction" or form.system:
        return (
            *_system(form),
            Turn("user", "".join(prompt), scored=False),
            Turn("assistant", answer, scored=True),
        )
    if not (prompt[-1][-1].isspace() or answer[0].isspace()):
        # Nothing else would tell where the one ends and the other begins.
        if form.template:
            answer = f" {answer}"
        else:
            prompt = [*prompt[:-1], f"{prompt[-1]}\n"]
    return (*(Turn("text", piece, scored=False) for piece in prompt), Turn("text", answer, scored=True))


def _system(form: Form) -> tuple[Turn, ...]:
    return (Turn("system", form.system, scored=False),) if form.system else ()


def _chats(table: "Dataset", form: Form) -> Iterator[tuple[Turn, ...]]:
    column = form.text[0]
    for row, cell in enumerate(table.select_columns(column)[column], 1):
        yield _chat(cell, row, form)


def _chat(cell: Any, row: int, form: Form) -> tuple[Turn, ...]:
    """The turns of a chat up to the assistant's last one; none where the assistant says nothing."""
    if isinstance(cell, dict):  # a list of records that the table keeps as columns
        cell = [dict(zip(cell, values, strict=True)) for values in zip(*cell.values(), strict=True)]
    turns = [_turn(message, row, form) for message in (cell if isinstance(cell, list) else ())]
    while turns and not turns[-1].scored:
        turns.pop()
    return (*(() if turns and turns[0].role == "system" else _system(form)), *turns) if turns else ()


def _turn(message: Any, row: int, form: Form) -> Turn:
    column = form.text[0]
    given = message if isinstance(message, dict) else {}
    role, content = given.get("role") or given.get("from"), given.get("content")
    content = given.get("value") if content is None else content
    if not isinstance(role, str) or not isinstance(content, str | None):
        raise UserError(
            f"row {row} of '{column}' has a message that is not a role and a text: {str(message)[:80]}",
            'write it as {"role": "user", "content": "…"} or {"from": "human", "value": "…"}',
        )
    if role.lower() not in ROLES:
        raise UserError(f"row {row} of '{column}' has a message by '{role}'", f"known: {', '.join(ROLES)}")
    role_here, said = ROLES[role.lower()], content or ""
    return Turn(role_here, said, scored=role_here == "assistant" and bool(said.strip()))


def _texts(table: "Dataset", column: str) -> list[str]:
    """The texts as they are, "" where there is none or nothing but spaces."""
    values = table.select_columns(column)[column][:]
    if wrong := [value for value in values if not isinstance(value, str | None)]:
        raise UserError(f"the column '{column}' holds {kind(wrong)}, not text", HINT)
    return [value if value and value.strip() else "" for value in values]
