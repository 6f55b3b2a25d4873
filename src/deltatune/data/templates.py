"""From dialogues to text in pieces: what a chat template writes around the turns, and which of it is scored.

A dialogue whose turns have the role "text" is not wrapped: its turns follow each other as they are, and the last scored
one is ended by the tokenizer's end token.

A chat goes through the tokenizer's own template, which Transformers runs in Jinja's sandbox. What the template adds for
an assistant's turn after it has opened it for generation is scored: the content and the token that ends the turn, but
not the white space after that token, which nobody generates. A tokenizer without a template gets a plain form like
Alpaca's:

    {system}⏎⏎### Instruction:⏎{user}⏎⏎### Response:⏎{assistant}{end token}⏎⏎### Instruction:⏎…

where a tool's turn stands under "### Tool:".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from deltatune.data.dialogues import Turn
from deltatune.errors import UserError

_HEADINGS = {"user": "### Instruction:\n", "assistant": "### Response:\n", "tool": "### Tool:\n"}
_GAP = "\n\n"
_SEE = "see chat_template in its tokenizer_config.json"


@dataclass(frozen=True)
class Piece:
    """Some text of an example, all of it scored or none."""

    text: str
    scored: bool


def has_template(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template writes these turns, and with them every special token."""
    return bool(tokenizer.chat_template) and any(turn.role != "text" for turn in turns)


def pieces(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """The turns up to the last scored one as text, unscored and scored in turn.

    What stands before the last scored piece is what generation of the last scored turn begins with. Raises UserError
    where the chat template fails or is refused by the sandbox, where it leaves the answer out or changes earlier turns
    as later ones come, and where there is no token to end a text with.
    """
    made = _templated(turns, tokenizer) if has_template(turns, tokenizer) else _plain(turns, tokenizer)
    merged: list[Piece] = []
    for piece in made:
        if merged and merged[-1].scored == piece.scored:
            merged[-1] = Piece(merged[-1].text + piece.text, piece.scored)
        elif piece.text:
            merged.append(piece)
    while merged and not merged[-1].scored:
        merged.pop()
    return merged


def _plain(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    if not tokenizer.eos_token:
        raise UserError(
            "the tokenizer of this base has no end token, without which no text it learns would ever end",
            "set eos_token in its tokenizer_config.json",
        )
    last = max((place for place, turn in enumerate(turns) if turn.scored), default=-1)
    for place, turn in enumerate(turns):
        end = tokenizer.eos_token if turn.role == "assistant" or place == last else ""
        yield Piece(_HEADINGS.get(turn.role, ""), scored=False)
        yield Piece(turn.content + end, turn.scored)
        yield Piece("" if turn.role == "text" else _GAP, scored=False)


def _templated(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    """Compares what the template writes before and after each scored turn."""
    special = tuple({*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())})
    done = ""
    for place, turn in enumerate(turns):
        if not turn.scored:
            continue
        opened = _render(turns[:place], tokenizer, opening=True)
        closed = _render(turns[: place + 1], tokenizer, opening=False)
        if not (opened.startswith(done) and closed.startswith(opened)):
            raise UserError(
                "the chat template of this base's tokenizer writes earlier turns otherwise once later ones follow, "
                "so that it cannot be told which of its text is the answer",
                "give chats with one answer each, or change chat_template in its tokenizer_config.json",
            )
        said = closed[len(opened) :]
        if not said.strip():
            raise UserError("the chat template of this base's tokenizer leaves out what the assistant says", _SEE)
        ended = said.rstrip()
        kept = len(ended) if ended.endswith(special) else len(said)
        yield Piece(opened[len(done) :], scored=False)
        yield Piece(said[:kept], scored=True)
        yield Piece(said[kept:], scored=False)
        done = closed


def _render(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, opening: bool) -> str:
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening))
    except Exception as error:  # a template is a program by others: it may raise whatever Python can
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"the chat template of this base's tokenizer fails: {reason or type(error).__name__}",
            f"it may want other roles, or turns in another order, than the data has; {_SEE}",
        ) from error
