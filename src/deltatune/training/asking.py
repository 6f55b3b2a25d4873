"""Asking a saved adapter: lines of text are labelled, or become prompts as they were in training and are answered."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deltatune.data.dialogues import Dialogue, DialogueData, Dialogues, Turn
from deltatune.data.forms import template_parts
from deltatune.data.turns import ROLES
from deltatune.errors import UserError, unknown
from deltatune.training.generation import Decoding, generate, prompts_before_answers, read_decoding
from deltatune.training.saved import Ready, predict, read_texts

_SAMPLE = 100
_HINT = 'write it as {"text": "…"}, or as {"messages": [{"role": "user", "content": "…"}]}'


@dataclass(frozen=True)
class Asking:
    """How the prompts of some data are made."""

    chat: bool
    """Whether they are a user's turn, or text that goes on."""
    gap: str = ""
    """White space that ends each prompt that is text."""
    system: str = ""
    template: str = ""
    """The words around the columns that a prompt is made of."""


def asking(data: DialogueData) -> dict[str, Any]:
    """How the data's prompts are made; an adapter keeps it as its record's `asking`."""
    asked = [example.prompt for example in data.train.examples[:_SAMPLE] if example.prompt]
    chat = any(turn.role != "text" for turn in (asked[0] if asked else ()))
    ended = bool(asked) and not (chat or data.template) and all(turns[-1].content.endswith("\n") for turns in asked)
    return asdict(Asking(chat, "\n" if ended else "", data.system, data.template))


def predictions(
    ready: Ready, lines: Sequence[tuple[str, str]], settings: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """What a saved adapter makes of each line of `read_lines`, in order: the label of a text, or what it writes.

    `settings` of writing stand before those of the adapter's record (`decoding`). Raises `UserError` for a wrong line
    or setting, and for any setting where texts are labelled.
    """
    if ready.base.model.can_generate():
        return answer(ready, lines, read_decoding({**ready.saved.about.get("decoding", {}), **settings}))
    if settings:
        raise UserError("this adapter labels texts and writes nothing", "leave out --decoding")
    return predict(ready, read_texts(lines))


def answer(ready: Ready, lines: Sequence[tuple[str, str]], decoding: Decoding) -> Iterator[dict[str, Any]]:
    """What a saved adapter writes after each line, in order: the line's own fields, and "prediction".

    `lines` are those of `read_lines`: plain text, or JSON with "text" (or "prompt"), with the columns of the template
    that the adapter was trained with, or with "messages". Raises `UserError` for a line that is none of these.
    """
    kept = ready.saved.about.get("asking")
    how = Asking(**kept) if kept else Asking(chat=bool(ready.base.tokenizer.chat_template))
    given = [_fields(line, where, how) for where, line in lines]
    examples = [
        Dialogue((*_turns(fields, where, how), Turn("assistant" if how.chat else "text", "…", scored=True)))
        for fields, (where, _) in zip(given, lines, strict=True)
    ]
    model, tokenizer = ready.base.model, ready.base.tokenizer
    asked = prompts_before_answers(model, tokenizer, Dialogues(examples), ready.max_length, decoding)
    written = generate(model, tokenizer, asked, decoding, ready.precision)
    for fields, text in zip(given, written, strict=True):
        yield {**fields, "prediction": text.strip()}


def _fields(line: str, where: str, how: Asking) -> dict[str, Any]:
    """What a line holds, by name; plain text is the "text", or the one column of the template."""
    columns = _columns(how)
    if not line.lstrip().startswith("{"):
        return {columns[0] if len(columns) == 1 else "text": line.strip()}
    try:
        fields: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}", _HINT) from error
    return fields


def _columns(how: Asking) -> list[str]:
    parts = template_parts(how.template) if how.template else []
    return list(dict.fromkeys(column for _, column in parts if column))


def _turns(fields: Mapping[str, Any], where: str, how: Asking) -> list[Turn]:
    if how.chat and "messages" in fields:
        turns = _chat(fields["messages"], where)
        begun = turns[0].role == "system"
    else:
        turns, begun = [Turn("user" if how.chat else "text", _prompt(fields, where, how), scored=False)], False
    return [*([Turn("system", how.system, scored=False)] if how.system and not begun else []), *turns]


def _prompt(fields: Mapping[str, Any], where: str, how: Asking) -> str:
    columns = _columns(how)
    wanted = columns or [next((name for name in ("text", "prompt") if name in fields), "text")]
    for name in wanted:
        if not isinstance(fields.get(name), str) or not fields[name].strip():
            hint = f'this adapter was trained on {", ".join(columns)}: write {{"{name}": "…"}}' if columns else _HINT
            raise UserError(f'{where} has no "{name}" that is a text', hint)
    if how.template:
        return "".join(words + (fields[column] if column else "") for words, column in template_parts(how.template))
    text: str = fields[wanted[0]]
    return text if text[-1].isspace() else text + how.gap


def _chat(messages: Any, where: str) -> list[Turn]:
    """The turns so far; what comes next is the assistant's."""
    turns = []
    for message in messages if isinstance(messages, list) else ():
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"{where} has a message that is not a role and a text: {str(message)[:80]}", _HINT)
        if role.lower() not in ROLES:
            raise unknown("role", role, ROLES)
        turns.append(Turn(ROLES[role.lower()], content, scored=False))
    if not turns:
        raise UserError(f"{where} has no messages", _HINT)
    return turns
